"""Data sets in the formats in which people have them on disk: their files, their samples' places, one sample.

    tar         img2dataset: an image, its caption in .txt, or else in .json
    parquet     BigDocs and VCR-wiki
    JSONL, JSON DocDownstream, MS-Swift and LLaVA: a record a line, or one list of them

A place is (start, stop) in bytes or rows, found without decoding what lies there. plumbing/streams.py says in which
order samples come.
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

MAX_RECORD = 256 * 2 ** 20  # bytes of a sample
PARQUET_COLUMNS = [["image", "query", "annotations"], ["stacked_image", "crossed_text"]]        # BigDocs, VCR-wiki
VCR_PROMPT = ("What is the covered texts in the image? "
              "Please restore the covered texts without outputting the explanations.")
HELD_OUT = re.compile(r"(val|valid|validation|test|dev)(?![a-z])")      # names of files and folders
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def data_files(path: str) -> tuple[Path, list[Path]]:
    """A folder, a file or a glob -> the folder that its images may lie in, and its files.

    Of a folder: the files of one format, in it or else one level below; img2dataset puts parquet and JSON beside its
    tars, so tars come first. What is called val, test or dev is left to evaluation. Raises InputError.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        files = [root] if root.is_file() else sorted(Path(file) for file in glob.glob(str(root)))
        if not files:
            raise InputError(f"{path}: no such file or folder")
        return Path(os.path.commonpath([file.parent for file in files])), files
    for pattern, suffix in itertools.product(("*", "*/*"), (".tar", ".parquet", ".jsonl", ".json")):
        files = [file for file in sorted(root.glob(pattern + suffix))
                 if not any(HELD_OUT.match(part) for part in file.relative_to(root).parts)
                 and (suffix != ".json" or file_format(file) == "json")]        # else it describes the others
        if files:
            return root, files
    raise InputError(f"{path}: no .tar, .parquet, .jsonl or .json (a list) in this folder or one level below")


def file_format(path: Path) -> str | None:
    """tar, parquet, jsonl or json (one list), by the file's first bytes; None if it is none of them."""
    try:
        with path.open("rb") as file:
            head = file.read(2 ** 16)
    except OSError:
        return None
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]         # after a byte order mark
    known = {"parquet": head[:4] == b"PAR1", "tar": head[257:262] == b"ustar", "json": first == b"[",
             "jsonl": first == b"{" or re.search(rb'^[ \t]*\{[ \t]*"', head, re.M)}       # a first line may be broken
    return next((kind for kind, fits in known.items() if fits), None)


def tar_spans(path: Path) -> list[tuple[int, int]]:
    """The bytes (start, stop) of each sample: neighbouring members that have one name up to its first dot.

    From where the archive is damaged or cut off the rest is one span (start, -1); a whole one ends in zeros.
    """
    spans, last, whole = [], None, False
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.size < 0:         # the next header would be this one again, for ever
                    raise tarfile.ReadError("negative size")
                if member.isdir():
                    last = None
                    continue
                stop = member.offset_data + -(-member.size // 512) * 512
                name = re.match(r"(?:.*/)?[^.]*", member.name)[0]
                start = spans.pop()[0] if name == last else member.offset
                spans.append((start, stop))
                last = name
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(512) == bytes(512)
        except tarfile.ReadError:
            pass
    return spans if whole else [*spans[:-1], (spans[-1][0] if spans else 0, -1)]


def line_spans(text: mmap.mmap, start: int, stop: int) -> list[tuple[int, int]]:
    """The bytes of each line that begins in text[start:stop]."""
    spans = []
    if start > 0:
        start = text.find(b"\n", start - 1, stop) + 1 or stop
    while start < min(stop, len(text)):
        end = text.find(b"\n", start) + 1 or len(text)
        if end - start > MAX_RECORD or text[start:end].strip():
            spans.append((start, end))
        start = end
    return spans


def list_spans(text: mmap.mmap, start: int, stop: int) -> list[tuple[int, int]]:
    """The bytes of each record of a JSON list from the first one with turns in text[start:stop] to that of the next.

    Records follow one another. Where the list is broken, and where a shard begins, the next one is found by its key,
    which cannot be inside a string: quotes are escaped there.
    """
    window, decoder = text[start:stop + 2 ** 22].decode("latin-1"), json.JSONDecoder()      # a character a byte

    def record_at(at: int) -> tuple[bool, int]:
        """Whether what is there has turns, and where it ends; 0 if it is broken."""
        try:
            record, end = decoder.raw_decode(window, at)
            return isinstance(record, dict) and not {"conversations", "messages"}.isdisjoint(record), end
        except (ValueError, RecursionError):
            return False, 0

    def next_record(first: int) -> int:
        for key in re.finditer(r'"(?:conversations|messages)"\s*:', window[first:]):
            at = first + key.start()
            for _ in range(20):         # its brace is the last one before it, or there are objects between
                at = window.rfind("{", first, at)
                if at < 0:
                    break
                if (found := record_at(at))[0] and found[1] > first + key.start():
                    return at
        return len(window)

    spans, at, broken = [], window.find("[") + 1 if start == 0 else next_record(0), start > 0
    while (at := re.compile(r"[\s,]*").match(window, at).end()) < len(window):
        if window[at] == "]" and not window[at + 1:].strip():
            break
        has_turns, end = record_at(at)
        if has_turns and at >= stop - start:        # the next shard's first
            break
        broken, end = not end, end or next_record(at + 1)
        spans.append((start + at, start + end))
        at = end
    else:
        if start + len(window) == len(text) and not broken:      # no "]": cut off between two records
            spans.append((start + at, start + at))
    return spans


def tar_example(data: bytes, key: str) -> Example:
    """img2dataset's sample: an image, its caption in .txt, or else in .json."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [m for m in tar if m.isfile()]
        if any(m.size > len(data) for m in files):
            raise BadSample("broken record", "a sparse member, larger than the sample")
        members = {m.name.rpartition(".")[2].lower(): tar.extractfile(m).read() for m in files}
    image = next((members[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in members), None)
    try:
        caption = members["txt"].decode() if "txt" in members else json.loads(members["json"])["caption"]
    except (KeyError, TypeError):
        raise BadSample("missing field", "neither a .txt nor a caption in a .json") from None
    if image is None:
        raise BadSample("missing field", f"no image among {', '.join(members)}")
    return conversation([io.BytesIO(image)], [("user", ""), ("assistant", caption)], key)


def read_parquet(path: Path):
    """The opened file. With read(use_threads=False) pyarrow starts no threads: a worker that is forked off beside them
    may wait for ever."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False)


def parquet_example(path: Path, row: int, key: str) -> Example:
    """A row of BigDocs (image, lists of queries and annotations) or VCR-wiki (stacked_image, crossed_text); its row
    group is read with it."""
    try:
        file = read_parquet(path)
        names = file.schema_arrow.names
        columns = next((columns for columns in PARQUET_COLUMNS if {*columns} <= {*names}), None)
        if columns is None:
            raise BadSample("missing field", f"no columns {' or '.join(map(', '.join, PARQUET_COLUMNS))} among "
                            + ", ".join(names))
        group = 0
        while row >= (n := file.metadata.row_group(group).num_rows):
            row, group = row - n, group + 1
        image, *texts = file.read_row_group(group, columns, use_threads=False).slice(row, 1).to_pylist()[0].values()
    except BadSample:
        raise
    except Exception as error:      # a damaged file shows itself in many ways
        raise BadSample("unreadable file", " ".join(str(error).split())) from None
    if not (isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"] and all(texts)
            and all(isinstance(text, list) and all(isinstance(t, str) for t in text) for text in texts)
            and len(texts[0]) == len(texts[-1])):
        raise BadSample("missing field", f"{', '.join(columns)}: empty, of another type, or not as many of each")
    asked, answers = texts if len(texts) == 2 else ([VCR_PROMPT], [", ".join(texts[0])])
    turns = [turn for pair in zip(asked, answers) for turn in zip(("user", "assistant"), pair)]
    return conversation([io.BytesIO(image["bytes"])], turns, key)


def json_example(data: bytes, folders: tuple[Path, Path], key: str) -> Example:
    """A record of DocDownstream or MS-Swift (messages; image or images) or of LLaVA (conversations; image).

    folders: the record's, then the data set's; images are files relative to either, and not outside the latter.
    """
    record, images = json.loads(data.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n,")), []
    try:
        turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
                 for turn in record.get("messages", record.get("conversations"))]
        names = record.get("images", record.get("image")) or []
        for name in [names] if isinstance(names, str) else names:
            paths = [Path(os.path.normpath(folder / name)) for folder in folders]
            inside = [path for path in paths if path.is_relative_to(folders[-1])]
            images.append(next((path for path in inside if os.path.isfile(path)), None))
            if images[-1] is None:
                raise BadSample("image not found" if inside else "image outside the folder", str(name))
    except (AttributeError, TypeError):
        raise BadSample("missing field", "no messages with role and content, or an image that is no name") from None
    return conversation(images, turns, key)


def split_images(text: str) -> list:
    """A data set's text -> a turn's parts: its `<image>` or `<|image|>` marks where an image goes.

    For the readers of data sets only: what a user types stays text.
    """
    return [IMAGE if part in ("<image>", "<|image|>") else part
            for part in re.split(r"(<image>|<\|image\|>)", text) if part]


def conversation(images: list, turns: list[tuple[str, str]], key: str) -> Example:
    """Image files and (role, text) pairs -> Example; images without marks stand before the first user's text."""
    if not all(isinstance(role, str) and role in ROLES and isinstance(text, str) for role, text in turns):
        raise BadSample("missing field", f"a turn that is no text of {', '.join(ROLES)}")
    turns = [Turn(ROLES[role], split_images(text) if ROLES[role] == "user" else [text]) for role, text in turns]
    asked = [turn.parts for turn in turns if turn.role == "user"]
    answers = [turn.parts for turn in turns if turn.role == "assistant"]
    marks = sum(parts.count(IMAGE) for parts in asked)
    if asked and marks == 0:
        asked[0][:0] = [IMAGE] * len(images)
    elif marks != len(images):
        raise BadSample("missing field", f"{marks} marks for {len(images)} images")
    if not answers:
        raise BadSample("missing field", "no answer")
    if not all(text.strip() for [text] in answers):
        raise BadSample("empty answer", "nothing to learn")
    return Example([read_image(image) for image in images], turns, key)
