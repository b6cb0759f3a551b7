"""Processes: one or many that find each other, their memory, and what to say when one of them is
missing."""
import contextlib
import ctypes
import os
import re
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from plumbing.settings import InputError
from plumbing.signals import watch_signals
from plumbing.texts import in_one_line

VARIABLES = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]    # that torchrun sets
FINDING = timedelta(minutes=10)         # processes that are started together find each other in
MEETING = timedelta(seconds=20)         # within which all notice that a rank is lost
# What gloo says of a rank that is gone, or does not come.
LOST = re.compile("closed by peer|reset by peer|broken pipe|no route to host|timed out",
                  re.IGNORECASE)

T = TypeVar("T")


def keep_heap() -> None:
    """Let glibc keep freed memory: by default each large buffer goes back to the kernel, and its
    pages fault in anew at the next operation, a third of a training step on a CPU."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


def keep_files_open() -> None:
    """Let a process open as many files as it may: each tensor that a loading process hands over is
    one."""
    if sys.platform == "win32":
        return
    import resource
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):       # macOS reports no limit, then refuses to have none
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def start_processes(timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Join torchrun's processes, or be the only one; nccl on CUDA, gloo on a CPU. Returns this
    one's device.

    timeout: of waiting for another. Changes the process: its heap, its limit of open files, its
    default process group and, on CUDA, its device. Raises InputError where the processes do not
    find each other or are more than the machine's GPUs, and where torchrun's variables make no
    sense.
    """
    is_one_of_many = check_variables(os.environ)
    keep_heap()
    keep_files_open()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local, n_devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= n_devices:
            raise InputError(f"no GPU for process {local + 1} of this machine, it has {n_devices}: "
                             f"start {n_devices} at most, or set CUDA_VISIBLE_DEVICES= to nothing "
                             "and train on the CPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"          # counts travel over gloo
    rank, world, store = 0, 1, None
    try:
        if is_one_of_many:
            patience = min(timeout, FINDING)
            store, rank, world = find_others(patience)
            store = own_part(store, rank, world, patience)
        dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank,
                                store=store or dist.HashStore())
    except dist.DistError as error:
        place = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
        raise InputError(f"the processes do not find each other ({place}): "
                         f"{str(error).splitlines()[0]}") from None
    check_same_kind(device)
    return device


def check_same_kind(device: torch.device) -> None:
    """Raise InputError, on all ranks, where some have a GPU and others have none: those would be
    waited for in vain. Every rank calls this."""
    have = torch.tensor(int(device.type == "cuda"))
    dist.all_reduce(have)
    world = dist.get_world_size()
    if 0 < have < world:
        here = f"; {socket.gethostname()} shows none to rank {dist.get_rank()}"
        raise InputError(f"{int(have)} of {world} processes have a GPU, the others none"
                         f"{here if device.type == 'cpu' else ''}: look at that machine's driver, "
                         "torch and CUDA_VISIBLE_DEVICES")


def check_variables(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or who stands in for it, has started this process as one of many. Raises
    InputError where its variables are not all there, or make no sense."""
    there = [name for name in VARIABLES if name in environment]
    missing = [name for name in VARIABLES if name not in environment]
    if "RANK" in missing:
        if environment.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is not set: "
                             "start with torchrun, or unset WORLD_SIZE for one process")
        return False
    if missing:
        raise InputError(f"{', '.join(there)} set, but not {', '.join(missing)}: start with "
                         "torchrun, or unset RANK for one process")
    whole = {"LOCAL_RANK": "0", **environment}
    for name, least, most in [("WORLD_SIZE", 1, 10 ** 6), ("MASTER_PORT", 1, 65535),
                              ("RANK", 0, 10 ** 6), ("LOCAL_RANK", 0, 10 ** 6)]:
        if not re.fullmatch("[0-9]{1,7}", whole[name]) or not least <= int(whole[name]) <= most:
            raise InputError(f"{name} is {whole[name]!r}, not a number from {least} to {most:,}: "
                             "start with torchrun, or unset RANK for one process")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise InputError(f"RANK is {environment['RANK']} of WORLD_SIZE {environment['WORLD_SIZE']}:"
                         " ranks count from 0: start with torchrun")
    return True


def find_others(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """torchrun's store, this process's rank and their number. Raises InputError or DistError.

    In a thread: where another program answers at the port torch waits for ever, and in C.
    """
    found = []

    def find() -> None:
        try:
            found.append(next(dist.rendezvous("env://", timeout=timeout)))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 5)
    if not found:
        raise InputError(f"at MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT "
                         f"{os.environ['MASTER_PORT']} something answers that is no rank 0: take "
                         "another port")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def own_part(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to.

    torchrun keeps its store when it restarts the processes, so they would find the dead ones'
    addresses (pytorch issue 135712), and its count of restarts differs between nodes. So rank 0
    invents a name. Another rank writes its own under the one that it finds, and takes that only
    when rank 0 answers: a rank 0 of an earlier attempt is dead and cannot. Raises InputError where
    none answers in time.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        forget_dump(store)
        store.set("attempt", me)
        for other in range(1, world):
            name = store.get(f"{me}/{other}").decode()      # waits until that rank has written it
            store.set(f"{me}/{name}", "welcome")
        return dist.PrefixStore(me, store)
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", me)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{name}/{me}"], timedelta(seconds=2))
            return dist.PrefixStore(name, store)
    raise InputError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0")


def forget_dump(store: dist.Store) -> None:
    """Delete what NCCL leaves in torchrun's store where an attempt dies of an error or a time-out.

    NCCL writes and reads it below all prefixes. The next attempt would find it and, 8 minutes
    later, end itself.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    store.delete_key("exception_dump")


@contextlib.contextmanager
def name_stalled_rank(timeout: timedelta) -> Iterator[None]:
    """If ranks wait in vain for another in here, raise InputError; who has waited for all of
    `timeout` names the one.

    Gloo closes the connections of a rank that has waited too long, so to others it seems to have
    ended. They end too, and so the last one hears of it. But each leaves a note in torchrun's
    store: who has left none is the one.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        leave_note()
        if "timed out" not in str(error).lower():
            raise InputError("another rank has ended, or has waited in vain: its own lines say "
                             "more, or torchrun's") from None
        silent = ranks_without_note()
        if not silent:
            raise InputError(f"a rank was more than {timeout.total_seconds():g} s late, and is "
                             "there again: the same command goes on; --timeout may be "
                             "more") from None
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        raise InputError(f"{names} of {dist.get_world_size()} stalled or ended: see the last lines "
                         "from there, if there are any") from None


def leave_note() -> None:
    """Say in torchrun's store that this rank has noticed that another is lost."""
    with contextlib.suppress(RuntimeError):     # the store is lost as well
        dist.distributed_c10d._get_default_store().set(f"noticed/{dist.get_rank()}", "")


def ranks_without_note() -> list[int]:
    """The ranks that leave none within MEETING. Where the store does not answer, rank 0: it, or its
    machine, keeps it."""
    store = dist.distributed_c10d._get_default_store()
    notes = [f"noticed/{rank}" for rank in range(dist.get_world_size())]
    until = time.monotonic() + MEETING.total_seconds()
    try:
        while not store.check(notes) and time.monotonic() < until:
            time.sleep(0.5)
        return [rank for rank, note in enumerate(notes) if not store.check([note])]
    except RuntimeError:
        return [0]


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on every rank: others may see an older disk. What it
    returns must be picklable. Every rank calls this.

    Raises InputError on all ranks where `work` raises it, or OSError.
    """
    result = [None, None]       # what it returned, or why it failed
    if dist.get_rank() == 0:
        try:
            result[0] = work()
        except (InputError, OSError) as error:
            result[1] = str(error)
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise InputError(result[1])
    return result[0]


def gather_model(model: nn.Module) -> nn.Module:
    """A copy of a model that is cut among ranks, in one piece on each: for small ones. Every rank
    calls this."""
    weights = {name: p.full_tensor() for name, p in model.state_dict().items()}
    device = next(iter(weights.values())).device
    copy = type(model)(model.config).to(device).eval()
    copy.load_state_dict(weights)
    return copy


def run_main(main: Callable[[], None]) -> None:
    """A program that may be one of many processes: exit status 2 and a line for bad input, 130 for
    Ctrl-C, 1 and a traceback for any other error. A second signal ends it wherever it waits
    (plumbing/signals.py).

    It ends at once: other ranks, or what writes a state, may be waiting for one that has died, and
    Python would wait for its own loading processes. What was printed until then is shown.
    """
    watch_signals()
    # A terminal that lacks a character is no reason to stop.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    stdout, stderr = Unheard(sys.stdout, BrokenPipeError), Unheard(sys.stderr, OSError, ValueError)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
            sys.stdout.flush()          # the disk may be full
        except KeyboardInterrupt:
            end_at_once(130)
        except Exception as error:
            # OSError: a disk is full, a file is missing.
            bad_input = isinstance(error, (InputError, OSError, SafetensorError))
            message = traceback.format_exc()
            if bad_input:
                message = in_one_line(f"{Path(sys.argv[0]).name}: {error}")
            print(message, file=sys.stderr, flush=True)
            end_at_once(2 if bad_input else 1)
        end_at_once(0)


class Unheard:
    """A stream like another one, but for some errors: what it cannot take then is lost, and no
    reason to stop. Ctrl-C ends `tee` first, a log's disk is full (OSError), a terminal is closed
    (ValueError), or there is none."""

    def __init__(self, stream: TextIO | None, *errors: type[Exception]):
        self.stream, self.errors = stream or open(os.devnull, "w"), errors

    def write(self, text: str) -> int:
        with contextlib.suppress(*self.errors):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self.errors):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def end_at_once(status: int) -> NoReturn:
    """os._exit, which would drop what is printed but not flushed."""
    with contextlib.suppress(OSError, ValueError):      # nobody reads it any more, or it is closed
        sys.stdout.flush()
    os._exit(status)
