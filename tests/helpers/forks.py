"""Start the repository's commands from a process that has imported torch already.

That takes most of their time. The process, the server, is started by commands.py and imports only:
no thread runs in it, no tensor is made. For each command it forks, and the fork runs the command as
Python would: with arguments, folder, environment and output of its own, in a session of its own, to
a real exit status. Forks of one server share its seed of str's hash: where two processes have to
agree whatever that is, start one of them as Python alone.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

SOCKET = "ALIGNVLM_TEST_FORKS"      # the environment's variable with the server's address
# What train.py and sample.py import, at once or when they first need it, and torchrun.
MODULES = ["train", "sample", "torch.distributed.launcher.api", "torch._dynamo"]


class Forked:
    """What subprocess.Popen(python, *command) is, with the methods that tests and torchrun need."""

    def __init__(self, command, cwd=None, env=None, stdout=None, stderr=None):
        self.args, self.returncode = [*map(str, command)], None
        self.stdout, self.stderr = stdout, stderr
        env = dict(env or os.environ)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.connect(env[SOCKET])
        outputs = [stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2]
        socket.send_fds(self.server, [b"\n"], outputs)
        request = json.dumps([self.args, str(cwd or os.getcwd()), env])
        self.server.sendall(request.encode() + b"\n")
        self.pid = self.reply()

    def reply(self) -> int:
        return struct.unpack("i", self.server.recv(4, socket.MSG_WAITALL))[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self.reply()
            self.server.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> list[str | None]:
        """What it has written to its files until its end."""
        self.wait(timeout)
        written = []
        for file in (self.stdout, self.stderr):
            if file:
                file.seek(0)
            written.append(file.read() if file else None)
        return written

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(listener: socket.socket) -> list[str]:
    """Fork for each request, and tell who made it the process's id and, in the end, its status.

    Returns in the forks, with their command. The server ends with the tests, whose end its standard
    input shows.
    """
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    # With the signal ignored select() would sleep on.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    running: dict[int, socket.socket] = {}      # by process
    gc.freeze()         # or a collection in a fork copies every page
    while True:
        ready = select.select([listener, woken, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
            sys.exit()
        if woken in ready:
            woken.recv(4096)
            tell_the_ended(running)
        if listener in ready:
            client = listener.accept()[0]
            outputs = socket.recv_fds(client, 1, 2)[1]
            with client.makefile() as lines:
                command, cwd, env = json.loads(lines.readline())
            pid = os.fork()
            if pid == 0:
                become(outputs, cwd, env)
                for file in (listener, woken, wake, client, *running.values()):
                    file.close()
                return command
            running[pid] = client
            for fd in outputs:
                os.close(fd)
            answer(client, pid)


def tell_the_ended(running: dict[int, socket.socket]) -> None:
    """The status of the forks that have ended, to those who asked for them."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        answer(running.pop(pid), os.waitstatus_to_exitcode(status))


def become(outputs: list[int], cwd: str, env: dict[str, str]) -> None:
    """Make this fork of the server a process as Python would have it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for n, fd in enumerate(outputs, 1):
        os.dup2(fd, n)
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)


def answer(client: socket.socket, number: int) -> None:
    try:
        client.sendall(struct.pack("i", number))
    except OSError:
        pass            # who asked is gone


def execute(command: list[str]) -> None:
    """`python *command`."""
    if command[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        command = command[1:]
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], os.getcwd()
        if command[1] == "torch.distributed.run":   # it starts its processes from the server, too
            from torch.distributed.elastic.multiprocessing import subprocess_handler
            subprocess_handler.SubprocessHandler._popen = (
                lambda self, args, env: Forked(args[1:], env=env))
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent.absolute())
        runpy.run_path(command[0], run_name="__main__")


def run_to_the_end(command: list[str]) -> NoReturn:
    """Ends as Python does, but does not take its modules apart: that would copy every page."""
    os.setsid()
    status = 0
    try:
        execute(command)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[SOCKET] + "~")
        listener.listen(64)
        os.rename(os.environ[SOCKET] + "~", os.environ[SOCKET])     # who finds it can connect
        for module in MODULES:
            importlib.import_module(module)
        sys.path.pop(0)
        command = serve(listener)
    run_to_the_end(command)
