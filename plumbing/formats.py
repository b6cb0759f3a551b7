"""Data sets in the formats in which people have them on disk: their files, their samples' places,
one sample.

    tar         img2dataset: an image, its caption in .txt, or else in .json
    parquet     BigDocs and VCR-wiki
    JSONL, JSON DocDownstream, MS-Swift and LLaVA: a record a line, or one list of them

A place, or span, is (start, stop) in bytes or rows, found without decoding what lies there.
plumbing/streams.py says in which order samples come.
"""
import glob
import io
import itertools
import json
import mmap
import os
import re
import tarfile
from pathlib import Path

from plumbing.examples import IMAGE, BadSample, Example, Turn
from plumbing.images import read_image
from plumbing.settings import InputError

Span = tuple[int, int]

MAX_RECORD = 256 * 2 ** 20      # bytes of a sample
BIGDOCS_COLUMNS = ["image", "query", "annotations"]
VCR_COLUMNS = ["stacked_image", "crossed_text"]
VCR_PROMPT = ("What is the covered texts in the image? "
              "Please restore the covered texts without outputting the explanations.")
HELD_OUT = re.compile(r"(val|valid|validation|test|dev)(?![a-z])")      # names of files and folders
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# --------------------------------------------------------------------------------------------------
# Which files


def data_files(path: str) -> tuple[Path, list[Path]]:
    """A folder, a file or a glob -> the folder that its images may lie in, and its files.

    Of a folder: the files of one format, in it or else one level below. img2dataset puts parquet
    and JSON beside its tars, so tars come first. What is called val, test or dev is left to
    evaluation. Raises InputError.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        files = [root] if root.is_file() else sorted(map(Path, glob.glob(str(root))))
        if not files:
            raise InputError(f"{path}: no such file or folder")
        return Path(os.path.commonpath([file.parent for file in files])), files
    for level, suffix in itertools.product(("*", "*/*"), (".tar", ".parquet", ".jsonl", ".json")):
        files = [file for file in sorted(root.glob(level + suffix)) if is_training_data(root, file)]
        if files:
            return root, files
    raise InputError(f"{path}: no .tar, .parquet, .jsonl or .json (a list) in this folder or one "
                     "level below")


def is_training_data(root: Path, file: Path) -> bool:
    """Whether a file below the root belongs to the training split, and holds samples at all: JSON
    that is no list describes other files."""
    if any(HELD_OUT.match(part) for part in file.relative_to(root).parts):
        return False
    return file.suffix != ".json" or file_format(file) == "json"


def file_format(path: Path) -> str | None:
    """tar, parquet, jsonl or json (one list), by the file's first bytes; None if it is none of
    them."""
    try:
        with path.open("rb") as file:
            head = file.read(2 ** 16)
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


# --------------------------------------------------------------------------------------------------
# Where the samples lie in a file


def tar_spans(path: Path) -> list[Span]:
    """The bytes of each sample: neighbouring members that have one name up to its first dot.

    From where the archive is damaged or cut off the rest is one span (start, -1); a whole one ends
    in zeros.
    """
    spans: list[Span] = []
    last = None             # the name of the sample that may go on
    is_whole = False
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.size < 0:         # the next header would be this one again, for ever
                    raise tarfile.ReadError("negative size")
                if member.isdir():
                    last = None
                    continue
                name = re.match(r"(?:.*/)?[^.]*", member.name)[0]
                start = member.offset
                if name == last:
                    start, _ = spans.pop()
                blocks = -(-member.size // 512)         # rounded up
                spans.append((start, member.offset_data + 512 * blocks))
                last = name
            tar.fileobj.seek(tar.offset)
            is_whole = tar.fileobj.read(512) == bytes(512)
        except tarfile.ReadError:
            pass
    if is_whole:
        return spans
    damaged_from = spans[-1][0] if spans else 0
    return [*spans[:-1], (damaged_from, -1)]


def line_spans(text: mmap.mmap, start: int, stop: int) -> list[Span]:
    """The bytes of each line that begins in text[start:stop]; empty lines are left out."""
    spans = []
    if start > 0:           # a line that began before it is another shard's
        start = text.find(b"\n", start - 1, stop) + 1 or stop
    while start < min(stop, len(text)):
        end = text.find(b"\n", start) + 1 or len(text)
        is_huge = end - start > MAX_RECORD      # reported later, and not read now
        if is_huge or text[start:end].strip():
            spans.append((start, end))
        start = end
    return spans


BETWEEN_RECORDS = re.compile(r"[\s,]*")
TURNS_KEY = re.compile(r'"(?:conversations|messages)"\s*:')
DECODER = json.JSONDecoder()


def record_at(window: str, at: int) -> tuple[bool, int]:
    """Whether the JSON value at a place is a record with turns, and where it ends; 0 if it is
    broken."""
    try:
        record, end = DECODER.raw_decode(window, at)
    except (ValueError, RecursionError):
        return False, 0
    has_turns = isinstance(record, dict) and ("conversations" in record or "messages" in record)
    return has_turns, end


def next_record(window: str, first: int) -> int:
    """Where the next record with turns begins, from `first` on; the window's length if there is
    none.

    It is found by its key, which cannot be inside a string: quotes are escaped there.
    """
    for key in TURNS_KEY.finditer(window, first):
        at = key.start()
        for _ in range(20):     # its brace is the last one before it, or there are objects between
            at = window.rfind("{", first, at)
            if at < 0:
                break
            has_turns, end = record_at(window, at)
            if has_turns and end > key.start():
                return at
    return len(window)


def list_spans(text: mmap.mmap, start: int, stop: int) -> list[Span]:
    """The bytes of each record of a JSON list from the first one with turns in text[start:stop] to
    that of the next shard.

    Records follow one another. Where the list is broken, and where a shard begins, the next one is
    looked for.
    """
    spans: list[Span] = []
    window = text[start:stop + 2 ** 22].decode("latin-1")       # a character a byte
    at = window.find("[") + 1 if start == 0 else next_record(window, 0)
    is_broken = start > 0
    while True:
        at = BETWEEN_RECORDS.match(window, at).end()
        if at == len(window):
            if start + len(window) == len(text) and not is_broken:
                # No "]": the list is cut off between two records. An empty record says so.
                spans.append((start + at, start + at))
            return spans
        if window[at] == "]" and not window[at + 1:].strip():
            return spans
        has_turns, end = record_at(window, at)
        if has_turns and at >= stop - start:        # the next shard's first
            return spans
        is_broken = end == 0
        if is_broken:
            end = next_record(window, at + 1)
        spans.append((start + at, start + end))
        at = end


# --------------------------------------------------------------------------------------------------
# One sample


def tar_example(data: bytes, key: str) -> Example:
    """img2dataset's sample: an image, its caption in .txt, or else in .json."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [member for member in tar if member.isfile()]
        if any(member.size > len(data) for member in files):
            raise BadSample("broken record", "a sparse member, larger than the sample")
        members = {}            # content by lower-case suffix
        for member in files:
            suffix = member.name.rpartition(".")[2].lower()
            members[suffix] = tar.extractfile(member).read()
    images = [members[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in members]
    try:
        if "txt" in members:
            caption = members["txt"].decode()
        else:
            caption = json.loads(members["json"])["caption"]
    except (KeyError, TypeError):
        raise BadSample("missing field", "neither a .txt nor a caption in a .json") from None
    if not images:
        raise BadSample("missing field", f"no image among {', '.join(members)}")
    return conversation([io.BytesIO(images[0])], [("user", ""), ("assistant", caption)], key)


def read_parquet(path: Path):
    """The opened file (pyarrow.parquet.ParquetFile). Raises InputError where pyarrow is missing.

    With read(use_threads=False) pyarrow starts no threads: a worker that is forked off beside them
    may wait for ever.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False)


def read_cells(path: Path, row: int) -> dict:
    """The cells of one row of BigDocs or VCR-wiki by column; its row group is read with it. Raises
    BadSample."""
    try:
        file = read_parquet(path)
        names = file.schema_arrow.names
        for columns in (BIGDOCS_COLUMNS, VCR_COLUMNS):
            if {*columns} <= {*names}:
                break
        else:
            known = f"{', '.join(BIGDOCS_COLUMNS)} or {', '.join(VCR_COLUMNS)}"
            raise BadSample("missing field", f"no columns {known} among {', '.join(names)}")
        group = 0
        while row >= file.metadata.row_group(group).num_rows:
            row -= file.metadata.row_group(group).num_rows
            group += 1
        rows = file.read_row_group(group, columns, use_threads=False)
        return rows.slice(row, 1).to_pylist()[0]
    except BadSample:
        raise
    except Exception as error:      # a damaged file shows itself in many ways
        raise BadSample("unreadable file", " ".join(str(error).split())) from None


def is_texts(cell) -> bool:
    """Whether a cell is a list of texts, one at least."""
    return isinstance(cell, list) and bool(cell) and all(isinstance(text, str) for text in cell)


def parquet_example(path: Path, row: int, key: str) -> Example:
    """A row of BigDocs (image, lists of queries and annotations) or of VCR-wiki (stacked_image,
    list of crossed texts, which are one answer)."""
    cells = read_cells(path, row)
    image, *texts = cells.values()
    has_image = isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"]
    if not has_image or not all(map(is_texts, texts)) or len(texts[0]) != len(texts[-1]):
        raise BadSample("missing field", f"{', '.join(cells)}: empty, of another type, or not as "
                                         "many of each")
    if len(texts) == 2:
        asked, answers = texts
    else:
        asked, answers = [VCR_PROMPT], [", ".join(texts[0])]
    turns = []
    for prompt, answer in zip(asked, answers):
        turns += [("user", prompt), ("assistant", answer)]
    return conversation([io.BytesIO(image["bytes"])], turns, key)


def json_example(data: bytes, folders: tuple[Path, Path], key: str) -> Example:
    """A record of DocDownstream or MS-Swift (messages; image or images) or of LLaVA (conversations;
    image).

    folders: the record's, then the data set's; images are files relative to either, and not outside
    the latter.
    """
    record = json.loads(data.removeprefix(BYTE_ORDER_MARK).strip(b" \t\r\n,"))
    try:
        turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
                 for turn in record.get("messages", record.get("conversations"))]
        names = record.get("images", record.get("image")) or []
        if isinstance(names, str):
            names = [names]
        images = [find_image(name, folders) for name in names]
    except (AttributeError, TypeError):
        raise BadSample("missing field", "no messages with role and content, or an image that is "
                                         "no name") from None
    return conversation(images, turns, key)


def find_image(name: str, folders: tuple[Path, Path]) -> Path:
    """The file of that name relative to one of the folders. Raises BadSample, also for a name that
    leads out of the last of them, the data set's."""
    paths = [Path(os.path.normpath(folder / name)) for folder in folders]
    inside = [path for path in paths if path.is_relative_to(folders[-1])]
    for path in inside:
        if os.path.isfile(path):
            return path
    raise BadSample("image not found" if inside else "image outside the folder", str(name))


def split_images(text: str) -> list[str | int]:
    """A data set's text -> a turn's parts: its `<image>` or `<|image|>` marks where an image goes.

    For the readers of data sets only: what a user types stays text.
    """
    parts = re.split(r"(<image>|<\|image\|>)", text)
    return [IMAGE if part in ("<image>", "<|image|>") else part for part in parts if part]


def conversation(images: list, turns: list[tuple[str, str]], key: str) -> Example:
    """Image files and (role, text) pairs -> Example. Images without marks stand before the first
    user's text. Raises BadSample or ImageError."""
    asked: list[Turn] = []
    answers: list[Turn] = []
    parsed: list[Turn] = []
    for role, text in turns:
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise BadSample("missing field", f"a turn that is no text of {', '.join(ROLES)}")
        turn = Turn(ROLES[role], [text])
        if turn.role == "user":
            turn.parts = split_images(text)
            asked.append(turn)
        elif turn.role == "assistant":
            answers.append(turn)
        parsed.append(turn)
    marks = sum(turn.parts.count(IMAGE) for turn in asked)
    if asked and marks == 0:
        asked[0].parts[:0] = [IMAGE] * len(images)
    elif marks != len(images):
        raise BadSample("missing field", f"{marks} marks for {len(images)} images")
    if not answers:
        raise BadSample("missing field", "no answer")
    if not all(turn.parts[0].strip() for turn in answers):
        raise BadSample("empty answer", "nothing to learn")
    return Example([read_image(image) for image in images], parsed, key)
