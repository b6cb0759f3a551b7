"""The repository's commands, as the tests start them: in processes of their own, or in this one.

On Linux a command is a fork of a server that has imported torch already (forks.py): that takes
most of a command's time. Elsewhere, and with alone(), it is Python from its first byte on.
"""
import atexit
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from pathlib import Path

from forks import SOCKET, Forked

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
# The environment of what tests start. torch.compile would start a compiler on each core: the tests
# of a GPU, which run one at a time, want them.
ENV = dict(os.environ)
if os.environ.get("TEST_DEVICE") != "cuda":
    ENV |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


@functools.cache
def server() -> None:
    """Start forks.py once; it ends with the tests. Puts its address into ENV."""
    folder = tempfile.mkdtemp()         # pytest's own folders may be too deep for a socket's path
    ENV[SOCKET] = f"{folder}/socket"
    process = subprocess.Popen([sys.executable, HELPERS / "forks.py"], env=ENV,
                               stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               start_new_session=True)
    while not Path(ENV[SOCKET]).exists():
        assert process.poll() is None, "tests/helpers/forks.py has failed"
        time.sleep(0.02)

    @atexit.register
    def end() -> None:
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder)


def start(*command, cwd=ROOT) -> Forked | subprocess.Popen:
    """One of the repository's commands, as its users start it with python."""
    if sys.platform != "linux":         # beside Apple's frameworks a fork may crash
        return alone(*command, cwd=cwd)
    server()
    return Forked(command, cwd, ENV, tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))


def run(*command, code=0, timeout=None, cwd=ROOT, start=start) -> subprocess.CompletedProcess:
    """The same, to its end and to the exit status that it must have."""
    process = start(*command, cwd=cwd)
    try:
        output = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()         # not kill(): torchrun ends its own processes then
        process.communicate()
        raise
    done = subprocess.CompletedProcess(command, process.returncode, *output)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def alone(*command, cwd=ROOT) -> subprocess.Popen:
    """As start(), but never a fork: where memory is measured, or processes are looked for."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def launcher(processes) -> list:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]


def torchrun(processes, *command, **options) -> subprocess.CompletedProcess:
    return run(*launcher(processes), *command, **options)


def sample(*options, code=0, typed="") -> types.SimpleNamespace:
    """sample.py in this process: as processes its hundred uses would take most of the time."""
    import sample as sample_py      # from ROOT, which is on the path by now
    out, err = io.StringIO(), io.StringIO()
    argv = ["sample.py", "--device", "cpu", *map(str, options)]
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          unittest.mock.patch.object(sys, "stdin", io.StringIO(typed)),
          unittest.mock.patch.object(sys, "argv", argv)):
        try:
            status = sample_py.main() or 0
        except SystemExit as end:
            status = end.code
    assert status == code, err.getvalue()
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
