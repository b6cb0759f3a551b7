"""SIGINT and SIGTERM: the first asks a program to leave, the second ends it, wherever it waits.

Python runs its handlers in the main thread, and not before that is back from C. From a barrier, a
full pipe or a hung disk it may never come back. So a thread hears the signals, too.
"""
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ENDING = signal.SIGINT, signal.SIGTERM
# Two signals so soon after each other are one act: `timeout` sends two, and where a cluster tells
# torchrun and its processes, torchrun tells them again.
ONE_ACT = 0.5           # seconds
PATIENCE = 1.0          # seconds after the first one; then it is said that a second one helps


def watch_signals() -> None:
    """From now on a second SIGINT or SIGTERM ends this process, with status 130 or 143.

    The first SIGINT raises KeyboardInterrupt, as ever. Call this in the main thread.
    """
    heard, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=end_on_second, args=(heard, wake), daemon=True).start()


def interrupt(*_) -> None:
    """Raise KeyboardInterrupt once: another one would only disturb what the first has begun."""
    signal.signal(signal.SIGINT, lambda *_: None)
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """In here the first SIGINT or SIGTERM sets `stop`, and nothing else."""
    before = [signal.signal(number, lambda *_: stop.set()) for number in ENDING]
    try:
        yield
    finally:
        for number, handler in zip(ENDING, before):
            signal.signal(number, handler)


def end_on_second(heard: socket.socket, wake: socket.socket) -> None:
    """The thread. heard: a byte for each signal, its number; wake: its other end, kept open."""
    while (number := next_signal(heard)) is None:
        pass
    began = time.monotonic()
    heard.settimeout(PATIENCE)
    said = os.environ.get("RANK", "0") != "0"       # the first rank says it
    while True:
        again = next_signal(heard)
        waited = time.monotonic() - began
        if again and waited > ONE_ACT:
            end(again)
        if waited >= PATIENCE and not said:
            say(f"{signal.Signals(number).name}: leaves as soon as it can; a second one ends it "
                "at once")
            said = True


def next_signal(heard: socket.socket) -> int | None:
    """The next one, if it is of ENDING: others come as well, and a time-out is none."""
    try:
        numbers = heard.recv(4096)
    except TimeoutError:
        return None
    return next((number for number in numbers if number in ENDING), None)


def end(number: int) -> NoReturn:
    say(f"{signal.Signals(number).name}: ended at once")
    # What was printed is shown, unless nobody reads it, or the main thread holds the stream.
    flush = threading.Thread(target=flush_output, daemon=True)
    flush.start()
    flush.join(0.5)
    os._exit(128 + number)


def flush_output() -> None:
    with contextlib.suppress(OSError, ValueError):      # nobody reads it any more, or it is closed
        sys.stdout.flush()


def say(text: str) -> None:
    """Write a line to stderr, below a progress bar; not where nobody reads, for that waits."""
    line = f"\n{Path(sys.argv[0]).name}: {text}\n"
    writer = threading.Thread(target=write_error, args=(line,), daemon=True)
    writer.start()
    writer.join(0.5)


def write_error(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="replace"))
