"""What the tests share: the repository root on sys.path, random weights, and the measure of "equal"."""
import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent / "helpers")]
from forks import SOCKET, Forked        # from tests/helpers

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"
# Of the processes that tests start; torch.compile would start one more Python, for a compiler on each core.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("sets")
torch.set_num_threads(1)    # the tensors are tiny: on a busy machine threads that wait for each other cost 10 times more


@functools.cache
def server() -> None:
    """forks.py, which starts what the tests start; it ends with them."""
    folder = tempfile.mkdtemp()         # a socket's path is short: pytest's own folders may be too deep
    ENV[SOCKET] = f"{folder}/socket"
    process = subprocess.Popen([sys.executable, HELPERS / "forks.py"], env=ENV, stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    while not Path(ENV[SOCKET]).exists():
        assert process.poll() is None, "tests/helpers/forks.py has failed"
        time.sleep(0.02)

    @atexit.register
    def end() -> None:
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder)


def start(*command, cwd=ROOT) -> Forked:
    """One of the repository's commands, as its users start it with python."""
    server()
    return Forked(command, cwd, ENV, tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))


def run(*command, code=0, timeout=None, cwd=ROOT, start=start):
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
    """As start(), but Python itself from its first byte on: where memory is measured, or processes are looked for."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def launcher(processes) -> list:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]


def torchrun(processes, *command, **options):
    return run(*launcher(processes), *command, **options)


def sample(*options, code=0, typed=""):
    """sample.py in this process: a process for each of its hundred uses would take most of the suite's time."""
    import sample as sample_py      # from ROOT, which is on the path by now
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          unittest.mock.patch.object(sys, "stdin", io.StringIO(typed)),
          unittest.mock.patch.object(sys, "argv", ["sample.py", "--device", "cpu", *map(str, options)])):
        try:
            status = sample_py.main() or 0
        except SystemExit as exit:
            status = exit.code
    assert status == code, err.getvalue()
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def rows(folder: Path) -> list[dict]:
    """The log of a stage."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float | None]:
    """By step; of a step that was done twice, the last."""
    return list({row["step"]: row["loss"] for row in rows(folder) if "loss" in row}.values())


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """The toy after two steps of stage 1: where trainings of stage 2 may start."""
    out = tmp_path_factory.mktemp("stage1")
    run("train.py", "--stage", 1, "--steps", 2, "--batch-size", 4, "--out", out)
    return out / "stage1"


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere: a bias of 0 or a norm's weight of 1 would hide that it is ignored."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.ndim > 1:
            p.copy_(noise * p[0].numel() ** -0.5)
        else:
            p.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return module


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5, scale: float | None = None) -> None:
    """Equal within `tolerance` of the largest value of theirs, or of `scale`."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.isfinite().all()
    scale = theirs.abs().max().item() if scale is None else scale
    assert scale > 0, "all zero: the comparison would show nothing"
    error = (ours - theirs).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g} at values up to {scale:.3g}"


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
