"""Processes: one or many that find each other, their memory, and what to say when one of them is
missing."""
import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from plumbing.settings import InputError

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
    default process group and, on CUDA, its device.
    """
    keep_heap()
    keep_files_open()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"          # counts travel over gloo
    rank, world, store = 0, 1, None
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = own_part(store, rank, world, timeout)
    dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank,
                            store=store or dist.HashStore())
    return device


def own_part(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to.

    torchrun keeps its store when it restarts the processes, so they would find the dead ones'
    addresses (pytorch issue 135712), and its count of restarts differs between nodes. So the first
    rank invents a name; another rank takes the one it finds only after it was answered under it,
    which no rank of an earlier attempt can do.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", me)
        for other in range(1, world):
            store.set(f"{me}/{store.get(f'{me}/{other}').decode()}", "welcome")
        return dist.PrefixStore(me, store)
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", me)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{name}/{me}"], timedelta(seconds=2))
            return dist.PrefixStore(name, store)
    raise InputError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0")


@contextlib.contextmanager
def name_stalled_rank(timeout: timedelta) -> Iterator[None]:
    """If ranks wait in vain for another in here, raise InputError with its name."""
    control = dist.new_group(backend="gloo")
    try:
        yield
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        try:
            wait = min(timeout, timedelta(seconds=30))
            dist.monitored_barrier(control, wait, wait_all_ranks=True)
        except RuntimeError as absent:
            raise InputError(f"a rank has stalled or died: {str(absent).splitlines()[0]}") from None
        raise


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on every rank: others may see an older disk. It can be
    pickled. Every rank calls this.

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


def ignore_signals(*_) -> None:
    """A cluster's SIGTERM, or Ctrl-C, reaches the loading processes too, whose samples the last
    step needs."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_main(main: Callable[[], None]) -> None:
    """A program that may be one of many processes: exit status 2 and a line for bad input, 130 for
    Ctrl-C.

    It ends at once: other ranks, or what writes a state, may be waiting for one that has died. What
    was printed until then is shown.
    """
    try:
        main()
    except KeyboardInterrupt:
        end_at_once(130)
    except Exception as error:
        # OSError: a disk is full, a file is missing.
        bad_input = isinstance(error, (InputError, OSError, SafetensorError))
        message = f"{Path(sys.argv[0]).name}: {error}" if bad_input else traceback.format_exc()
        print(message, file=sys.stderr, flush=True)
        end_at_once(2 if bad_input else 1)


def end_at_once(status: int) -> NoReturn:
    """os._exit, which would drop what is printed but not flushed."""
    with contextlib.suppress(OSError, ValueError):      # nobody reads it any more, or it is closed
        sys.stdout.flush()
    os._exit(status)
