"""Loading processes: how they start, and what is said when one of them, or a sample, is lost."""
import ctypes
import errno
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from torch.utils.data import DataLoader

from plumbing.settings import InputError
from plumbing.signals import ENDING

SHARED_MEMORY = ("the shared memory /dev/shm is full: start Docker with --shm-size 8g or --ipc "
                 "host, or load without processes: --workers 0")
PATIENCE = 2            # seconds that a loading process may take to end
# Why a loading process ended, by its exit status: see end_with_reason. A negative one is a signal.
REASONS = {
    errno.ENOSPC: SHARED_MEMORY,
    -7: SHARED_MEMORY,                  # SIGBUS: its memory was there, and then was not
    errno.EMFILE: "too many open files: raise `ulimit -n`, or load without processes: --workers 0",
    errno.ENOMEM: "no memory is left: fewer --workers, or none: --workers 0",
    -9: "killed, as is done where no memory is left: fewer --workers, or none: --workers 0",
}


def start_worker(*_) -> None:
    """What a loading process does first, as DataLoader's worker_init_fn."""
    # A cluster's SIGTERM, or Ctrl-C, reaches it too, but the last step needs its samples.
    signal.set_wakeup_fd(-1)            # its parent's, which hears for itself
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    # So it has to go with its parent, however that ends, and whatever it waits for itself.
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # multiprocessing would print what is wrong, drop the sample and go on: it would be waited for.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_with_reason)


def end_with_reason(error: Exception, _) -> NoReturn:
    """End a loading process that cannot hand over a sample: the exit status says why."""
    for reason in REASONS:
        if reason > 0 and os.strerror(reason) in str(error):
            os._exit(reason)
    traceback.print_exception(error)
    os._exit(1)


def loaded(loader: DataLoader) -> Iterator:
    """What a loader brings, in its order. Raises InputError, with a line, where a loading process
    or a sample is lost."""
    if not loader.num_workers:
        yield from loader
        return
    try:
        items = iter(loader)
    except OSError as error:
        why = REASONS.get(error.errno, error.strerror or error)
        raise InputError(f"no loading process can start: {why}") from None
    # torch would raise from a handler, in the midst of a step. The queue says it, too.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (InputError, RuntimeError, OSError, EOFError) as error:
            if why := why_lost(items, error):
                raise InputError(why) from None
            raise
        yield item


def why_lost(items: Iterator, error: Exception) -> str | None:
    """A line about a loading process that has ended, or a sample that did not arrive; None for
    other errors."""
    text = str(error).strip()
    if text.startswith("Caught "):      # in a loading process, with the place where it was raised
        if isinstance(error, InputError):
            return text.splitlines()[-1].partition(": ")[2]
        return None
    is_cut_off = isinstance(error, (ConnectionError, EOFError))
    if is_cut_off:                      # by a process that is ending, but has not yet
        sentinels = [worker.sentinel for worker in items._workers]
        ending = multiprocessing.connection.wait(sentinels, PATIENCE)
        for worker in items._workers:
            if worker.sentinel in ending:
                worker.join(PATIENCE)
    ended = [worker for worker in items._workers if worker.exitcode]
    if ended:
        status = ended[0].exitcode
        why = REASONS.get(status, f"exit status {status}: --workers 0 shows where it fails")
        return f"the loading process {ended[0].pid} has ended: {why}"
    for reason in REASONS:
        if reason > 0 and os.strerror(reason) in text:
            return f"a sample is lost on its way from a loading process: {REASONS[reason]}"
    if is_cut_off or "ancdata" in text:
        return f"a sample is lost on its way from a loading process: {text or 'its end'}"
    return None
