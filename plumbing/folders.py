"""What the files of a folder are: data to learn from, held-out data, images, or foreign.

    data_files("mine/")                     # what is trained on
    data_files("mine/", held_out=True)      # what is left to evaluation
    image_files("pages/")

The names decide, by the same rule for folders, files and members of an archive. A file that is
named itself is taken, whatever it is called.
"""
import glob
import os
import re
from pathlib import Path, PurePath

from plumbing.settings import InputError

DATA_SUFFIXES = (".tar", ".parquet", ".jsonl", ".json")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp",
                  ".gif", ".jp2", ".avif", ".pbm", ".pgm", ".ppm", ".pnm", ".pdf")
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl")        # images that Pillow cannot read
FOREIGN = ("__MACOSX", "@eaDir")        # folders that systems put beside the files
# Words of a name. A name with one of the first kind is for training, whatever else it says; of the
# others evaluation takes the first kind that a folder has.
TRAINING = ("train", "training", "trainval")
HELD_OUT = (("val", "valid", "validation", "dev", "eval", "evaluation", "heldout"),
            ("test", "testing"))
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_foreign(name: str | PurePath) -> bool:
    """Whether a relative name is hidden (`.ipynb_checkpoints/a.jsonl`, `._a.png`) or lies in a
    folder of the system's."""
    parts = PurePath(name).parts
    return any(part in FOREIGN or part.startswith(".") and part not in (".", "..")
               for part in parts)


def words_of(name: str) -> set[str]:
    """The words of a name: doc, vqa, val, dev and jsonl of DocVQAVal-dev.jsonl."""
    name = re.sub("(?i)held.?out", "heldout", name)
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def held_out_kind(name: str | PurePath) -> int | None:
    """Which of HELD_OUT a relative name belongs to, by its own words or those of a folder in it;
    None for training."""
    for part in PurePath(name).parts:
        words = words_of(part)
        for kind, names in enumerate(HELD_OUT):
            if not words & {*TRAINING} and words & {*names}:
                return kind
    return None


def path_exists(path: str) -> bool:
    """Whether a path, or a glob, names anything."""
    return os.path.exists(path) or bool(glob.glob(path))


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, as they are written or with the links on the way to them
    followed."""
    path = Path(os.path.normpath(path))
    if path.is_relative_to(folder):
        return True
    try:
        real = Path(os.path.realpath(path.parent)) / path.name
        return real.is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):           # a name that no file can have
        return False


def data_files(path: str, held_out: bool = False) -> tuple[Path, list[Path]]:
    """A folder, a file or a glob -> the folder that its images may lie in, and its files.

    Of a folder: the files of one format, in it or else one level below. img2dataset puts parquet
    and JSON beside its tars, so tars come first. What is called val, test or dev is left to
    evaluation, which asks with held_out=True; where no file is called so, but the folder is, all
    of it. Raises InputError.
    """
    root = Path(os.path.abspath(path))
    try:
        is_folder = root.is_dir()
        if not is_folder:
            # The pattern as it was given: a folder above it may have brackets in its name.
            found = [root] if root.is_file() else glob.glob(path)
            files = sorted(Path(os.path.abspath(file)) for file in found)
    except PermissionError:
        raise unreadable(root) from None
    if is_folder:
        return root, folder_files(root, held_out)
    if not files:
        hint = ""
        if re.match(r"https?:", path):
            hint = " here: data on the web are downloaded first"
        raise InputError(f"{path}: no such file or folder{hint}")
    return Path(os.path.commonpath([file.parent for file in files])), files


def folder_files(root: Path, held_out: bool) -> list[Path]:
    """The data files of a folder, or those held out from it. Raises InputError."""
    others = []             # data of the other kind
    for below in ("*", "*/*"):
        by_suffix: dict[str, list[Path]] = {suffix: [] for suffix in DATA_SUFFIXES}
        for file in sorted(root.glob(below)):
            name = file.relative_to(root)
            if file.suffix.lower() in by_suffix and not is_foreign(name):
                by_suffix[file.suffix.lower()].append(file)
        for suffix, files in by_suffix.items():
            if suffix == ".json":           # JSON that is no list describes other files
                files = [file for file in files if file_format(file) == "json"]
            wanted = of_split(root, files, held_out)
            if wanted:
                return wanted
            others += files
    if not others:
        if not os.access(root, os.R_OK | os.X_OK):
            raise unreadable(root)
        raise InputError(f"{root}: no .tar, .parquet, .jsonl or .json (a list) in this folder or "
                         "one level below")
    shown = ", ".join(str(file.relative_to(root)) for file in others[:3])
    if held_out:
        raise InputError(f"{root}: nothing there is called val, dev or test ({shown}): name the "
                         "files that are held out")
    raise InputError(f"{root}: only held-out data there, by their names ({shown}): name a file "
                     "to train on it all the same")


def of_split(root: Path, files: list[Path], held_out: bool) -> list[Path]:
    """Those of a folder's files that are for training, or of the first kind of held-out data."""
    kinds = {file: held_out_kind(file.relative_to(root)) for file in files}
    if not held_out:
        return [file for file in files if kinds[file] is None]
    there = [kind for kind in kinds.values() if kind is not None]
    if there:
        return [file for file in files if kinds[file] == min(there)]
    if held_out_kind(root.name) is None:
        return []
    return [file for file in files if not words_of(file.name) & {*TRAINING}]


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names. Raises InputError where there is
    none."""
    try:
        files = [file for file in sorted(folder.iterdir())
                 if file.suffix.lower() in IMAGE_SUFFIXES and not is_foreign(file.name)
                 and file.is_file()]
    except PermissionError:
        raise unreadable(folder) from None
    if not files:
        raise InputError(f"{folder}: no image in this folder")
    return files


def unreadable(path: Path) -> InputError:
    return InputError(f"{path}: it may not be read (permission denied)")


def file_format(path: Path) -> str | None:
    """tar, parquet, jsonl or json (one list), by the file's first bytes; None if it is none of
    them. Raises InputError for a file that may not be read."""
    try:
        with path.open("rb") as file:
            head = file.read(2 ** 16)
    except PermissionError:
        raise unreadable(path) from None
    except OSError:
        return None
    if head[:4] == b"PAR1":
        return "parquet"
    if head[257:262] == b"ustar":
        return "tar"
    first = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if first == b"[":
        return "json"
    # The first line may be broken: then any line that begins like an object with keys will do.
    if first == b"{" or re.search(rb'^[ \t]*\{[ \t]*"', head, re.M):
        return "jsonl"
    return None
