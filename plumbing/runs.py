"""The folders of a run: which stage is complete, what it was trained with, where a new one begins.

    OUT/stage2              is complete: a model folder, its log and recipe
    OUT/stage2.partial      holds one that is not, and its training states (plumbing/states.py)
    OUT/.lock               is held by the run that is at work in OUT

recipe.json holds what a stage was trained with, an id of that training, and what it started from:
the id of the training before, or a checksum of released weights.
"""
import errno
import json
import os
import shutil
import socket
import sys
import time
import uuid
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from plumbing.files import file_mark, write_text
from plumbing.saving import why_not
from plumbing.settings import InputError, read_json
from plumbing.states import STATE, check_room, newest_state

SHOWN_WITHIN = timedelta(seconds=90)    # a new folder, by a network's file system
TAKEN = errno.EACCES, errno.EAGAIN      # another process has the lock
LEASE = timedelta(seconds=120)          # after which NFS frees the lock of a machine that is gone


def claim(out: Path, timeout: timedelta = 2 * LEASE) -> None:
    """Make the folder `out`, and keep it for this process until that ends, however it does: two
    runs in one folder would delete each other's states. Raises InputError where another has it, or
    where OUT/.lock is somebody's own file.

    The lock is POSIX's, which loading processes do not inherit, and which NFS knows. One of another
    machine is waited for, LEASE or half of `timeout` at most: after all of it other ranks would
    count this one as stalled.
    """
    try:
        os.fspath(out).encode()
    except UnicodeEncodeError:
        raise InputError(f"--out {out}: a name that is no UTF-8, which not everything here can "
                         "read") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)    # open as long as we live
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    if owner_of(lock) and not owner_of(lock).startswith("process "):
        raise InputError(f"{out / '.lock'}: not this program's lock: take another --out")
    if sys.platform == "win32":         # it has no such lock
        return
    here = socket.gethostname()
    patience = min(LEASE, timeout / 2)
    last_look = time.monotonic() + patience.total_seconds()
    is_said = False
    while (error := try_lock(lock)) in TAKEN:
        owner = owner_of(lock) or "another process"     # it has not said yet who it is
        line = f"{out}: {owner} is at work in this folder: wait for it, or take another --out"
        if owner.endswith(f" on {here}"):
            raise InputError(line)
        if time.monotonic() > last_look:
            raise InputError(f"{line}; if its machine is gone, delete {out / '.lock'}")
        if not is_said:
            is_said = True
            print(f"{out}: {owner} is at work in this folder, or was: its lock is waited for, "
                  f"{patience.total_seconds():.0f} s at most", file=sys.stderr)
        time.sleep(1)
    if error:
        print(f"{out} cannot be locked here ({os.strerror(error)}): start no second run in it",
              file=sys.stderr)
        return
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {here}".encode(), 0)


def owner_of(lock: int) -> str:
    """What the holder of an open lock has written into it."""
    return os.pread(lock, 200, 0).decode(errors="replace")


def try_lock(lock: int) -> int:
    """Lock an open file -> 0, or the number of the error."""
    import fcntl
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return 0


def recorded(folder: Path, key: str, default=None):
    """A setting of the recipe.json in a stage's folder; the default where either is missing. Raises
    CheckpointError for a damaged file."""
    if not (folder / "recipe.json").exists():
        return default
    return read_json(folder / "recipe.json").get(key, default)


def weights_mark(*folders: Path) -> int | None:
    """What tells released weights from others: a checksum of the sizes of their files, and of some
    of their bytes. None where a folder's are no longer there."""
    marks = [[file_mark(file) for kind in ("*.safetensors", "*.pth")
              for file in sorted(folder.glob(kind))] for folder in folders]
    return zlib.crc32(json.dumps(marks).encode()) if all(marks) else None


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, was not begun anew, and started from what is in the stage
    before's, if anything is."""
    folder = out / f"stage{stage}"
    if not (folder / "config.json").exists() or newest_state(out / f"stage{stage}.partial"):
        return False
    before = recorded(out / f"stage{stage - 1}", "id")      # None: released weights
    return before is None or recorded(folder, "start", before) == before


def refuse_foreign(folder: Path, partial: Path) -> None:
    """Raise InputError if a stage's model could not be saved in `folder`, by way of `partial`,
    because something else is there."""
    why = why_not(folder, partial)
    if why:
        raise InputError(why)


def check_recipe(folder: Path, recipe: dict) -> None:
    """Raise InputError if the stage in `folder` was trained, or begun, with another recipe than is
    asked for now. A "start" of None is not known, and fits any."""
    changed = []
    for key, value in recipe.items():
        before = recorded(folder, key, value)
        if before != value and not (key == "start" and None in (before, value)):
            changed.append("other weights to start from" if key == "start"
                           else f"{key} {before}, not {value}")
    if changed:
        raise InputError(f"{folder} was trained with {', '.join(changed)}: take another --out, or "
                         "delete that folder")


def begin(folder: Path, recipe: dict, model: nn.Module) -> tuple[Path | None, str]:
    """Make a stage's folder ready to work in. Returns the training state to go on from, if there is
    one, and the new id of this training.

    Makes the folder, drops states that were not written to their end, and writes recipe.json, with
    that id. Raises InputError where the state is of another recipe or the disk has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(f"{STATE}.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)       # as drop_states
        state = newest_state(folder)
        if state:
            check_recipe(folder, recipe)
        check_room(folder, model)
        record = {**recipe, "id": uuid.uuid4().hex}
        write_text(folder / "recipe.json", json.dumps(record, indent=2) + "\n")
        return state, record["id"]
    except OSError as error:
        raise InputError(f"--out {folder.parent}: {error.strerror}") from None


def check_shared(folder: Path, training: str, timeout: timedelta) -> None:
    """Raise InputError, on all ranks, unless all see the folder that the first one has begun, by
    the id of its training. Every rank calls this.

    Ranks write their parts of a state into it: on a node with a folder of its own they would be
    lost. A network's file system may show a new folder a while later, so they look again, for half
    of `timeout` at most: after all of it a rank counts as stalled.
    """
    last_look = time.monotonic() + min(SHOWN_WITHIN, timeout / 2).total_seconds()
    while recorded(folder, "id") != training and time.monotonic() < last_look:
        time.sleep(1)
    does_not_see = torch.tensor(int(recorded(folder, "id") != training))
    dist.all_reduce(does_not_see)
    if does_not_see > 0:
        raise InputError(f"{folder}: {int(does_not_see)} of {dist.get_world_size()} processes do "
                         "not see it: --out is a folder that all nodes share")
