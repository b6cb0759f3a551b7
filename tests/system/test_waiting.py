"""Whoever waits can be interrupted, and what is lost is said: signals, loading processes, ranks.

Signals and processes are real. What cannot be had on every machine, a full /dev/shm, is the error
that torch raises there.
"""
import json
import os
import signal
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from conftest import HELPERS, run, start
from kill import descendants
from plumbing.processes import check_variables, own_part
from plumbing.settings import InputError
from toy.pages import STAGE0

LIMIT = 5           # seconds from the second signal to the end
BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    run("-m", "toy.pages", "--draw", 8, "--seed", 5, "--train", folder)
    return folder / "train.jsonl"


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "stage2").symlink_to(STAGE0)
    return tmp_path


def train(out: Path, *more) -> list:
    return ["train.py", "--stage", 3, "--steps", 2000, "--batch-size", 4, "--lr", 1e-5,
            "--held-out", 0, "--out", out, *more]


def until(what, process, seconds: float = 90) -> None:
    """Wait until what() is true."""
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


def steps(out: Path) -> int:
    log = out / "stage3.partial" / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def said(process) -> str:
    """What it has written to stderr so far."""
    return os.pread(process.stderr.fileno(), 10 ** 6, 0).decode(errors="replace")


def end_by_two(process, number: int, apart: float = 1.2) -> str:
    """Send a signal twice; the process has to end in time, with the status that belongs to it and
    without a traceback. Returns what it said."""
    process.send_signal(number)
    with suppress(Exception):               # the first one may be enough
        process.wait(apart)
    process.send_signal(number)
    process.wait(LIMIT)
    error = process.communicate()[1]
    assert process.returncode in (128 + number, -number), error
    assert "Traceback" not in error
    return error


def gone(pids: list[int]) -> bool:
    """Whether none of these processes runs, a second from now at the latest: the kernel kills them
    once their parent has ended. One that nobody has asked for its status has ended."""
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"
    for _ in range(100):
        if all(state(pid) in ("gone", "Z", "X") for pid in pids):
            return True
        time.sleep(0.01)
    return False


def as_rank(rank: int, port: int, *command) -> list:
    """A command as one of two ranks, without torchrun."""
    variables = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    code = (f"import os, runpy; os.environ.update({variables}); "
            f"runpy.run_path({command[0]!r}, run_name='__main__')")
    return ["-c", code, *command[1:]]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", BOTH)
def test_a_process_that_hangs_while_loading(data, out, number):
    """The main process waits for its sample; the first signal waits for it, too."""
    process = start(*train(out, "--data", data, "--workers", 1))
    until(lambda: steps(out) > 1, process)
    workers = descendants(process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    time.sleep(2)                           # until what was loaded before is used up
    error = end_by_two(process, number)
    assert "a second one ends it" in error and error.rstrip().endswith("ended at once")
    assert gone(workers)


@pytest.mark.parametrize("number", BOTH)
def test_a_rank_that_waits_for_another(out, port, number):
    """In an all_reduce, in C, where no handler of Python's runs."""
    ranks = [start(*as_rank(rank, port, *train(out))) for rank in range(2)]
    until(lambda: steps(out) > 1, ranks[0])
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    end_by_two(ranks[0], number)
    ranks[1].kill()


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_other_never_comes(tmp_path, port, program, rank, number):
    began = tmp_path / "began"
    command = as_rank(rank, port, program, "--out", tmp_path / "out")
    says_so = ("import torch.distributed as dist; find = dist.rendezvous; dist.rendezvous = "
               f"lambda *a, **k: [open({str(began)!r}, 'w'), find(*a, **k)][1]; ")
    command[1] = says_so + command[1]
    process = start(*command)
    until(began.exists, process)
    time.sleep(0.5)
    end_by_two(process, number)


@pytest.mark.parametrize("number", BOTH)
def test_held_out_pages_at_the_end_are_left_at_the_first(out, number):
    process = start(*train(out, "--steps", 1, "--held-out", 5000))
    until(lambda: "reading held-out" in said(process), process)
    process.send_signal(number)
    process.wait(LIMIT)
    error = process.communicate()[1]
    assert process.returncode in (128 + number, -number) and "Traceback" not in error
    assert (out / "stage3" / "model.safetensors").exists()


@pytest.mark.parametrize("number", BOTH)
def test_a_model_that_is_written_for_ever(out, number):
    """The disk hangs at the export. What was trained is there: the same command writes it."""
    code = """if True:
        import runpy, sys, time
        import plumbing.saving
        def hang(*args, **options):
            print("saving", file=sys.stderr, flush=True)
            time.sleep(600)
        plumbing.saving.save_file = hang
        runpy.run_path("train.py", run_name="__main__")
    """
    command = train(out, "--steps", 2)
    process = start("-c", code, *command[1:])
    until(lambda: "saving" in said(process), process)
    end_by_two(process, number)
    assert not (out / "stage3").exists()
    run(*command)
    log = (out / "stage3" / "log.jsonl").read_text()
    assert log.count('"loss"') == 2 and (out / "stage3" / "config.json").exists()


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("command", [
    ["eval.py", "--benchmark", "toy=5000", "--checkpoint", STAGE0],
    ["sample.py", "--checkpoint", STAGE0, "--device", "cpu", "--image", "FIFO"]])
def test_eval_and_sample_leave_at_the_first(tmp_path, command, number):
    """eval.py while it answers, sample.py while it waits for an image that nobody writes."""
    fifo = tmp_path / "page.png"
    os.mkfifo(fifo)
    command = [str(fifo) if part == "FIFO" else part for part in command]
    is_eval = command[0] == "eval.py"
    process = start(*command, *(["--out", tmp_path / "eval"] if is_eval else []))
    until(lambda: ("toy:" if is_eval else "model: ") in said(process), process)
    time.sleep(0.5)
    process.send_signal(number)
    process.wait(LIMIT)
    error = process.communicate()[1]
    assert process.returncode in (128 + number, -number) and "Traceback" not in error


def test_two_signals_at_once_are_one_act(out):
    """`timeout` sends two, and so do a cluster and torchrun together: the step is saved."""
    process = start(*train(out))
    until(lambda: steps(out) > 1, process)
    for pause in (0, 0.02, 0.1):
        time.sleep(pause)
        process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    [state] = (out / "stage3.partial").glob("step-*")
    assert json.loads((state / "progress.json").read_text())["step"] == steps(out)


def test_nobody_reads_what_is_printed(out):
    """stderr is a pipe that is full: the main thread waits in write(), and so would a last line."""
    code = """if True:
        import fcntl, os, runpy, sys
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x")
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.dup2(writer, 2)
        runpy.run_path("train.py", run_name="__main__")
    """
    process = start("-c", code, *train(out)[1:])
    time.sleep(6)
    end_by_two(process, signal.SIGTERM)


# --------------------------------------------------------------------------------------------------
# Loading processes


@pytest.mark.parametrize("error, why", [
    ('RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on '
     'device (28)")', "--shm-size"),
    ('OSError(24, "Too many open files")', "ulimit -n"),
    ('RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)")', "no memory is left"),
    ('RuntimeError("something else")', "exit status 1"),
])
def test_a_sample_that_cannot_be_handed_over_is_a_line(data, out, error, why):
    code = f"""if True:
        import runpy, torch
        def full(self, *_):
            raise {error}
        torch.UntypedStorage._share_fd_cpu_ = full
        runpy.run_path("train.py", run_name="__main__")
    """
    command = train(out, "--data", data, "--workers", 2)[1:]
    last = run("-c", code, *command, code=2, timeout=60).stderr.splitlines()[-1]
    assert last.startswith("train.py: the loading process ") and why in last
    assert "--workers 0" in last


def test_no_loading_process_can_start(data, out):
    code = """if True:
        import errno, multiprocessing.synchronize, os, runpy
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        multiprocessing.synchronize.SemLock._make_name = full
        runpy.run_path("train.py", run_name="__main__")
    """
    done = run("-c", code, *train(out, "--data", data, "--workers", 2)[1:], code=2, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: no loading process can start: ") and "--shm-size" in last


@pytest.mark.parametrize("number, why", [(signal.SIGKILL, "no memory"), (signal.SIGBUS, "/dev/shm"),
                                         (signal.SIGSEGV, "exit status -11")])
def test_a_loading_process_that_dies_is_a_line(data, out, number, why):
    process = start(*train(out, "--data", data, "--workers", 2))
    until(lambda: steps(out) > 1, process)
    workers = descendants(process.pid)
    os.kill(workers[0], number)
    error = process.communicate(timeout=60)[1]
    last = error.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in error
    assert last.startswith(f"train.py: the loading process {workers[0]} has ended: ")
    assert why in last
    time.sleep(0.2)
    assert gone(workers)


def test_bad_input_found_by_a_loading_process_is_one_line(data, out):
    code = """if True:
        import runpy
        from plumbing.settings import InputError
        from plumbing.streams import DataSet
        def read(self, *_):
            raise InputError("no file: as it should be")
        DataSet.read = read
        runpy.run_path("train.py", run_name="__main__")
    """
    done = run("-c", code, *train(out, "--data", data, "--workers", 2)[1:], code=2, timeout=60)
    assert done.stderr.splitlines()[-1] == "train.py: no file: as it should be"
    assert "Traceback" not in done.stderr


def test_loading_processes_go_with_their_parent(data, out):
    """However it ends, and whatever they wait for themselves."""
    process = start(*train(out, "--data", data, "--workers", 2))
    until(lambda: steps(out) > 1, process)
    workers = descendants(process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    process.kill()
    process.wait(LIMIT)
    time.sleep(0.5)
    assert len(workers) == 2 and gone(workers)


# --------------------------------------------------------------------------------------------------
# Ranks


def test_a_rank_that_ends_is_a_line_of_the_other(out, port):
    ranks = [start(*as_rank(rank, port, *train(out))) for rank in range(2)]
    until(lambda: steps(out) > 1, ranks[0])
    ranks[1].kill()
    error = ranks[0].communicate(timeout=60)[1]
    assert ranks[0].returncode == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("train.py: another rank has ended, or ")


@pytest.mark.parametrize("how, lost", [("stalls", 4), ("stalls", 0), ("dies", 4),
                                       ("dies-loading", 4)])
def test_of_six_ranks_the_one_that_is_lost_is_named_and_no_other(tmp_path, how, lost):
    """The others come one after another: who waits too long looks like one that has ended. One that
    has ended is named by nobody who did not wait."""
    said = list(lines_of_six(how, lost, tmp_path).values())
    named = [line for line in said if line.startswith(f"rank {lost} of 6 stalled or ended: ")]
    assert named or how != "stalls"
    assert all(line.startswith("another rank has ended") or line in named for line in said), said


def test_a_rank_that_comes_late_is_said_to_be_late(tmp_path):
    said = lines_of_six("is-late", 1, tmp_path).values()
    assert any(line.startswith("a rank was more than ") for line in said)
    assert not any("stalled" in line for line in said), said


def test_a_machine_whose_gpus_are_not_seen_is_named(tmp_path):
    for rank, said in lines_of_six("has-a-gpu", 4, tmp_path).items():
        assert said.startswith("1 of 6 processes have a GPU, the others none")
        assert (f"{socket.gethostname()} shows none to rank {rank}" in said) == (rank != 4)


def lines_of_six(how: str, lost: int, folder: Path) -> dict[int, str]:
    """What each rank of helpers/lost_ranks.py says that does not die or stall."""
    ranks = {rank: start(HELPERS / "lost_ranks.py", how, lost, folder, rank) for rank in range(6)}
    other = ranks.pop(lost) if "dies" in how or how == "stalls" else None
    said = {rank: process.communicate(timeout=200)[0].strip() for rank, process in ranks.items()}
    if other:
        other.kill()
    return said


FULL = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, named", [
    ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, "RANK"),
    ({**FULL, "RANK": "x"}, "RANK"),
    ({**FULL, "RANK": ""}, "RANK"),
    ({**FULL, "RANK": "-1"}, "RANK"),
    ({**FULL, "RANK": "2"}, "RANK"),
    ({**FULL, "WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ({**FULL, "WORLD_SIZE": "2.0"}, "WORLD_SIZE"),
    ({**FULL, "MASTER_PORT": "port"}, "MASTER_PORT"),
    ({**FULL, "MASTER_PORT": "70000"}, "MASTER_PORT"),
    ({**FULL, "LOCAL_RANK": "one"}, "LOCAL_RANK"),
])
def test_variables_of_torchrun_that_make_no_sense(variables, named):
    with pytest.raises(InputError, match=named):
        check_variables(variables)


def test_variables_of_torchrun_that_make_sense():
    assert check_variables({**FULL, "LOCAL_RANK": "0"}) and check_variables(FULL)
    assert not check_variables({})
    assert not check_variables({"WORLD_SIZE": "1", "MASTER_ADDR": "localhost"})


def test_a_new_attempt_does_not_find_what_nccl_left_of_the_old_one():
    root = dist.HashStore()
    root.set("exception_dump", "1")
    own_part(dist.PrefixStore("a", dist.PrefixStore("b", root)), 0, 1, timedelta(seconds=5))
    assert not root.check(["exception_dump"])


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_a_port_that_is_taken_is_a_line(tmp_path, program):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        command = as_rank(0, taken.getsockname()[1], program, "--out", tmp_path / "out")
        error = run(*command, code=2, timeout=60).stderr
    line = error.splitlines()[-1]
    assert line.startswith(f"{program}: the processes do not find each other (RANK=0, ")
    assert "Traceback" not in error


def test_another_program_at_the_port_is_a_line(tmp_path):
    """It accepts and says nothing: torch has no limit for that."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        command = as_rank(1, other.getsockname()[1], "train.py", "--timeout", "1", "--out",
                          tmp_path / "out")
        error = run(*command, code=2, timeout=60).stderr
    assert "something answers that is no rank 0" in error.splitlines()[-1]


def test_a_rank_alone_is_a_line_when_its_time_is_over(tmp_path, port):
    command = as_rank(1, port, "train.py", "--timeout", "2", "--out", tmp_path / "out")
    error = run(*command, code=2, timeout=60).stderr
    assert "the processes do not find each other (RANK=1, " in error.splitlines()[-1]
    assert "Traceback" not in error
