"""Files that are there whole or not at all, and what may be replaced by one."""
import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.settings import InputError

MARKED = 2 ** 16            # bytes, in three places, by which a file is known again
WRITTEN = ".written"        # in a folder of OwnFiles: what was written into it


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(path.name + ".partial")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8: beside its place first, then renamed. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """The same for any file."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """Where a file is written, beside its place, which it takes at the end of the block. If that
    fails nothing is left of it; after Ctrl-C what was written is. A link stays one. mark: what
    tells it from another process's, where two may write the same file. Raises InputError for a
    folder, OSError with the file's name."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file")
    partial = partial_of(path.with_name(path.name + mark))
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)      # of a full disk it would not be said
        raise


def file_mark(path: Path) -> list[int]:
    """A file's size, and a checksum of its first, middle and last MARKED bytes: of a terabyte of
    tars all would be too many. Of a file that cannot be read both are 0: its samples are bad ones.
    """
    checksum = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in (0, (size - MARKED) // 2, size - MARKED):
                file.seek(max(0, start))
                checksum = zlib.crc32(file.read(MARKED), checksum)
    except OSError:
        return [0, 0]
    return [size, checksum]


def to_disk(path: Path) -> None:
    """Wait until what was written to a file is on the disk, also if the machine should fail."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError if `out` is a folder, or one of the files that are read, by whatever name or
    link. Call it before any work is done."""
    if out.is_dir():
        raise InputError(f"{out}: a folder, not a file")
    for path in inputs:
        for written in (out, partial_of(out)):
            with contextlib.suppress(OSError):      # one of them is not there: two files
                if os.path.samefile(written, path):
                    raise InputError(f"{out}: would be written over {path}, which is read: take "
                                     "another name")


def numbered(out: Path, n: int, inputs: Iterable[Path]) -> list[Path]:
    """Where n files go: `out`, or of several NAME-1, NAME-2, ... A link to a file stays one.

    Raises InputError where one of them is read, is a folder or has none to stand in, and where one
    that nobody has named is there and is not ours.
    """
    paths = [Path(os.path.realpath(out)) if out.is_symlink() else out]
    if n > 1:
        paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, n + 1)]
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not a file")
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}")
        refuse_inputs(path, inputs)
        if n > 1 and os.path.lexists(path) and not is_ours(path):
            raise InputError(f"{path}: is there already: delete it, or take another name")
    return paths


def is_ours(path: Path) -> bool:
    """Whether a picture or an HTML page says that this program has made it."""
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return b"AlignVLM" in file.read(2000)


class OwnFiles:
    """The files that a command writes into a folder of the user's.

    It replaces what is as it has written it, and refuses the folder if one of `names` is there that
    it has not written, or that was changed since (InputError). FOLDER/.written tells them: a
    SHA-256 and a name a line, as `sha256sum -c` reads it.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = set()
        with contextlib.suppress(FileNotFoundError):
            self.lines = set((folder / WRITTEN).read_text(errors="replace").splitlines())
        self.names = set(names)
        for name in sorted(self.names):
            if os.path.lexists(folder / name) and not self.has_written(name):
                raise InputError(f"{folder / name}: is not from this command, or was changed: give "
                                 "another folder, or delete it")

    def drop_others(self) -> None:
        """Delete what an earlier call has written under other names, unless it was changed: what it
        says of pages that are drawn anew would be false."""
        earlier = {line.partition("  ")[2] for line in self.lines}
        for name in sorted(earlier - self.names):
            if Path(name).name == name and self.has_written(name):
                (self.folder / name).unlink()

    def has_written(self, name: str) -> bool:
        """Whether a file is there as it was written."""
        path = self.folder / name
        return (path.is_file() and not path.is_symlink()
                and written_line(path.read_bytes(), name) in self.lines)

    def write(self, name: str, data: bytes) -> None:
        """Write one of the names. What is written is listed first: a kill in between leaves the
        older file, which is listed as well."""
        with (self.folder / WRITTEN).open("a") as file:
            file.write(written_line(data, name) + "\n")
        write_bytes(self.folder / name, data)


def written_line(data: bytes, name: str) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {name}"
