"""Data sets in the formats in which people have them on disk: their samples' places, one sample.

    tar         img2dataset: an image, its caption in .txt, or else in .json
    parquet     BigDocs, VCR-wiki, and records as in JSON
    JSONL, JSON DocDownstream, MS-Swift and LLaVA: a record a line, or one list of them

A place, or span, is (start, stop) in bytes or rows, found without decoding what lies there.
plumbing/streams.py says in which order samples come, plumbing/folders.py which files are data.

What a sample can mean in two ways is no sample: it is "ambiguous". What a format can say and this
reader does not do is "not implemented". Neither is learnt.
"""
import io
import json
import mmap
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

from plumbing.examples import IMAGE, BadSample, Example, Turn
from plumbing.folders import BYTE_ORDER_MARK, IMAGE_SUFFIXES, is_foreign, is_inside
from plumbing.images import read_pages
from plumbing.settings import InputError

Span = tuple[int, int]
DAMAGED, TWICE = -1, -2         # stops of spans that cannot be read, and why

MAX_RECORD = 256 * 2 ** 20      # bytes of a sample
BIGDOCS_COLUMNS = ["image", "query", "annotations"]
VCR_COLUMNS = ["stacked_image", "crossed_text"]
TURNS = ("messages", "conversations")       # a record's fields
IMAGES = ("images", "image")
VCR_PROMPT = ("What is the covered texts in the image? "
              "Please restore the covered texts without outputting the explanations.")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
MARKS = ("<image>", "<|image|>")
# Other formats' ways to show something in a user's turn.
OTHER_MARKS = re.compile(r"<video>|<audio>|<img>.*?</img>|<audio>.*?</audio>", re.S)
# Other models' marks for an image. They are text where there is no image, or one has its own mark.
OTHER_IMAGE_MARKS = re.compile(
    r"<\|vision_start\|>|<img_context>|<\|?image[ _-]?(\d+|pad|here|placeholder|token)\|?>"
    r"|(?!(?-i:<image>|<\|image\|>))<\|?\s*image\s*\|?>", re.I)
# A record's fields that may be its image by another name.
OTHER_IMAGES = re.compile(r"image|img|pic|photo|^pages?$", re.I)
# Fields of a record, and of a turn, that mean something which this reader does not do.
OTHER_FIELDS = ("videos", "video", "audios", "audio", "objects", "tools", "system", "history",
                "rejected_messages", "rejected_response", "rejected_images")
OTHER_TURN_FIELDS = ("tool_calls", "function_call")
EMPTY = (None, "", [], {})      # absent, null and empty are one


# --------------------------------------------------------------------------------------------------
# Where the samples lie in a file


def sample_name(member: str) -> str:
    """What the members of one sample have in common: their name up to its last dot.

    webdataset takes the first dot: then pages called 22.05.png and 22.06.png would be one sample.
    """
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, _ = name.rpartition(".")
    return folder + slash + (stem or name)


def tar_spans(path: Path) -> list[Span]:
    """The bytes of each sample: neighbouring members of one name, without foreign ones.

    From where the archive is damaged or cut off the rest is one span (start, DAMAGED); a whole one
    ends in zeros. Where a name comes back later, all that have it are (start, TWICE).
    """
    spans: list[Span] = []
    names: list[str] = []       # of each span
    last = None                 # the name of the sample that may go on
    is_whole = False
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                if member.size < 0:         # the next header would be this one again, for ever
                    raise tarfile.ReadError("negative size")
                if member.isdir():
                    last = None
                    continue
                if is_foreign(member.name):
                    continue
                name = sample_name(member.name)
                start = member.offset
                if name == last:
                    start, _ = spans.pop()
                else:
                    names.append(name)
                blocks = -(-member.size // 512)         # rounded up
                spans.append((start, member.offset_data + 512 * blocks))
                last = name
            tar.fileobj.seek(tar.offset)
            is_whole = tar.fileobj.read(512) == bytes(512)
        except tarfile.ReadError:
            pass
    times = Counter(names)
    spans = [(start, TWICE if times[name] > 1 else stop)
             for name, (start, stop) in zip(names, spans)]
    if is_whole:
        return spans
    damaged_from = spans[-1][0] if spans else 0
    return [*spans[:-1], (damaged_from, DAMAGED)]


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
LIST_ITEM = re.compile(r"[\[,}]\s*(\{)")          # also where the comma between two is missing
INSIDE_A_RECORD = re.compile(r'\]\s*(?:\}|,\s*")')    # a list that ends there is a field's
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
    none. What holds other records is met before them. In a string there is none: its quotes are
    escaped."""
    for item in LIST_ITEM.finditer(window, first):
        has_turns, _ = record_at(window, item.start(1))
        if has_turns:
            return item.start(1)
    return len(window)


def list_spans(text: mmap.mmap, start: int, stop: int) -> list[Span]:
    """The bytes of each record of a JSON list from the first one with turns in text[start:stop] to
    that of the next shard.

    Records follow one another. Where the list is broken, and where a shard begins, the next one is
    looked for. What was found so was no record if the list that it is in belongs to one.
    """
    spans: list[Span] = []
    unsure_from = 0 if start else None      # of the spans, those since a record was looked for
    window = text[start:stop + 2 ** 22].decode("latin-1")       # a character a byte
    before = text[max(0, start - 1024):start].rstrip()[-1:].decode("latin-1")
    at = window.find("[") + 1 if start == 0 else next_record(before + window, 0) - len(before)
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
        if unsure_from is not None and INSIDE_A_RECORD.match(window, at):
            del spans[unsure_from:]
            is_broken = True
            at = next_record(window, at + 1)
            continue
        has_turns, end = record_at(window, at)
        if has_turns and at >= stop - start:        # the next shard's first
            return spans
        is_broken = end == 0
        if is_broken:
            end = next_record(window, at + 1)
        spans.append((start + at, start + end))
        if is_broken:
            unsure_from = len(spans)
        at = end


# --------------------------------------------------------------------------------------------------
# One sample


def tar_example(data: bytes, key: str) -> Example:
    """img2dataset's sample: an image, its caption in .txt, or else in .json."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = [member for member in tar if member.isfile() and not is_foreign(member.name)]
        if any(member.size > len(data) for member in files):
            raise BadSample("broken record", "a sparse member, larger than the sample")
        members = {}            # content by lower-case suffix
        for member in files:
            suffix = "." + member.name.rpartition(".")[2].lower()
            if suffix in members:
                raise BadSample("ambiguous", f"two members are its {suffix}")
            members[suffix] = tar.extractfile(member).read()
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise BadSample("ambiguous", f"two members are images: {', '.join(images)}")
    try:
        if ".txt" in members:
            caption = members[".txt"].decode("utf-8-sig")
        else:
            caption = parse_json(members[".json"])["caption"]
    except (KeyError, TypeError):
        raise BadSample("missing field", "neither a .txt nor a caption in a .json") from None
    if not images:
        raise BadSample("missing field", f"no image among {', '.join(members)}")
    turns = [Turn("user", [IMAGE]), Turn("assistant", [caption])]
    return conversation([io.BytesIO(members[images[0]])], turns, key)


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
    """The cells of one row by column, of those columns that its format has; its row group is read
    with it. Raises BadSample."""
    try:
        file = read_parquet(path)
        columns = columns_of(file.schema_arrow.names)
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


def columns_of(names: list[str]) -> list[str]:
    """The columns to be read of a parquet file that has these. Raises BadSample."""
    there = {*names}
    fits = [columns for columns in (BIGDOCS_COLUMNS, VCR_COLUMNS) if {*columns} <= there]
    if there & {*TURNS}:
        known = (*TURNS, *IMAGES, *OTHER_FIELDS, "label")
        fits.append([name for name in known if name in there]
                    + [name for name in names if name not in known and OTHER_IMAGES.search(name)])
    if not fits:
        known = (f"{', '.join(BIGDOCS_COLUMNS)} or {', '.join(VCR_COLUMNS)} or image and "
                 f"{' or '.join(TURNS)}")
        raise BadSample("missing field", f"no columns {known} among {', '.join(names)}")
    if len(fits) > 1:
        raise BadSample("ambiguous", f"columns of two formats: {', '.join(names)}")
    if any(names.count(column) > 1 for column in fits[0]):
        raise BadSample("ambiguous", f"two columns of one name: {', '.join(names)}")
    return fits[0]


def is_texts(cell) -> bool:
    """Whether a cell is a list of texts, one at least."""
    return isinstance(cell, list) and bool(cell) and all(isinstance(text, str) for text in cell)


def parquet_example(path: Path, row: int, key: str, root: Path | None = None) -> Example:
    """A row of BigDocs (image, lists of queries and annotations), of VCR-wiki (stacked_image, list
    of crossed texts, which are one answer), or a record as in JSON, with its images or their names,
    which lie in the file's folder or in root."""
    cells = read_cells(path, row)
    if {*cells} & {*TURNS}:
        return record_example(cells, (path.parent, root or path.parent), key)
    image, *texts = cells.values()
    content = image_bytes(image)
    if content is None or not all(map(is_texts, texts)) or len(texts[0]) != len(texts[-1]):
        raise BadSample("missing field", f"{', '.join(cells)}: empty, of another type, or not as "
                                         "many of each")
    if len(texts) == 2:
        asked, answers = texts
    else:
        asked, answers = [VCR_PROMPT], [", ".join(texts[0])]
    turns = []
    for i, (prompt, answer) in enumerate(zip(asked, answers)):
        # The page stands before the first question, or where it has a mark. Later ones are text.
        parts = split_images(prompt) if i == 0 else [prompt]
        turns += [Turn("user", parts), Turn("assistant", [answer])]
    return conversation([content], turns, key)


def image_bytes(cell) -> io.BytesIO | None:
    """The image in a cell of parquet; None where there is none."""
    content = cell.get("bytes") if isinstance(cell, dict) else None
    return io.BytesIO(content) if isinstance(content, bytes) and content else None


def json_example(data: bytes, folders: tuple[Path, Path], key: str) -> Example:
    """A record of DocDownstream or MS-Swift (messages; image or images) or of LLaVA (conversations;
    image).

    folders: the record's, then the data set's; images are files relative to either, and not outside
    the latter.
    """
    record = parse_json(data.removeprefix(BYTE_ORDER_MARK).strip(b" \t\r\n,"))
    return record_example(record, folders, key)


def parse_json(data: bytes):
    """JSON in which no object has two values for one key. Raises BadSample, ValueError."""
    def unique(pairs: list[tuple]) -> dict:
        fields: dict = {}
        for name, value in pairs:
            if name in fields and fields[name] != value:
                raise BadSample("ambiguous", f"two values for {name[:50]!r}")
            fields[name] = value
        return fields

    return json.loads(data, object_pairs_hook=unique)


# --------------------------------------------------------------------------------------------------
# Records


def is_empty(value) -> bool:
    """Whether a field says nothing. 0 and false say something."""
    return any(value is empty or type(value) is type(empty) and value == empty for empty in EMPTY)


def field(record: dict, names: tuple[str, ...]):
    """What a record says under one of several names. Absent, null and empty are one.

    Raises BadSample where two of them differ.
    """
    values = [record[name] for name in names if name in record]
    filled = [value for value in values if not is_empty(value)]
    if any(value != filled[0] for value in filled):
        raise BadSample("ambiguous", f"{' and '.join(names)} differ")
    # An empty text is still a text: an empty answer.
    return (filled or [value for value in values if value is not None] or [None])[0]


def record_example(record: dict, folders: tuple[Path, Path], key: str) -> Example:
    """Fields of MS-Swift's, DocDownstream's or LLaVA's names -> Example. Raises BadSample."""
    try:
        for name in OTHER_FIELDS:
            value = record.get(name)
            if isinstance(value, dict):         # parquet has all of its keys, with nulls
                value = [part for part in value.values() if not is_empty(part)]
            if not is_empty(value):
                raise BadSample("not implemented", f"its field {name}")
        if record.get("label") is False:        # MS-Swift's way to say that an answer is bad
            raise BadSample("not implemented", "its field label, false")
        turns = [record_turn(turn) for turn in field(record, TURNS)]
    except (AttributeError, TypeError):
        raise BadSample("missing field", "no messages with role and content") from None
    try:
        images = [find_image(image, folders) for image in record_images(record)]
    except (AttributeError, TypeError):
        raise BadSample("missing field", "an image that is no name") from None
    if not images:
        refuse_unread_images(record)
    for turn in turns:
        if images and turn.role != "user" and any(mark in turn.parts[0] for mark in MARKS):
            raise BadSample("not implemented", f"an image in a turn of the {turn.role}")
    return conversation(images, turns, key)


def record_images(record: dict) -> list:
    """The images of a record, however it names them."""
    several = {name: record[name] if isinstance(record[name], list) else [record[name]]
               for name in IMAGES if not is_empty(record.get(name))}
    return field(several, IMAGES) or []


def refuse_unread_images(record: dict) -> None:
    """Raise BadSample where a record without images has one in another field: `image_path` is no
    key of any format here, and its question would be learnt without the page."""
    for name, value in record.items():
        parts = value if isinstance(value, list) else [value]
        names = [part.get("path") if isinstance(part, dict) else part for part in parts]
        named = any(isinstance(part, str) and part.lower().endswith(IMAGE_SUFFIXES)
                    for part in names)
        if any(map(image_bytes, parts)) or named and OTHER_IMAGES.search(name):
            raise BadSample("not implemented", f"its field {name[:50]}: an image stands in "
                                               f"{' or '.join(IMAGES)}")


def record_turn(turn: dict) -> Turn:
    """A turn of a record. Raises BadSample, TypeError and AttributeError."""
    if not isinstance(turn, dict):
        raise TypeError
    role, text = field(turn, ("role", "from")), field(turn, ("content", "value"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadSample("missing field", f"a turn of the role {str(role)[:50]!r}, which is none of "
                                         f"{', '.join(ROLES)}")
    if not isinstance(text, str):
        raise BadSample("missing field", f"a turn of the {role} whose content is no text")
    for name in OTHER_TURN_FIELDS:
        if not is_empty(turn.get(name)):
            raise BadSample("not implemented", f"a turn's field {name}")
    role = ROLES[role]
    if role == "user" and OTHER_MARKS.search(text):
        raise BadSample("not implemented", f"{OTHER_MARKS.search(text)[0][:50]} in a question")
    parts = split_images(text) if role == "user" else [text]
    return Turn(role, parts, is_learnt(turn))


def is_learnt(turn: dict) -> bool:
    """Whether a turn's answer is learnt: MS-Swift's loss and loss_scale, OpenAI's weight. Raises
    BadSample."""
    said = [turn[name] for name in ("loss", "loss_scale", "weight") if turn.get(name) is not None]
    if any(value not in (0, 1) for value in said):
        raise BadSample("not implemented", "a turn's weight other than 0 and 1")
    return all(said)


def find_image(image, folders: tuple[Path, Path]) -> Path | io.BytesIO:
    """The file of that name relative to one of the folders, or what parquet holds, bytes or a path.
    Raises BadSample, also for a name that leads out of the last of them, the data set's."""
    content = image_bytes(image)
    if content is not None:
        return content
    if isinstance(image, dict):
        image = image.get("path")
    paths = [Path(os.path.normpath(folder / image)) for folder in folders]
    inside = [path for path in paths if is_inside(path, folders[-1])]
    for path in inside:
        if os.path.isfile(path):
            return path
    if any(map(is_forbidden, inside)):
        raise BadSample("unreadable file", f"{image}: it may not be read (permission denied)")
    if "://" in image or image.startswith("data:"):
        raise BadSample("image not found", f"{image[:100]}: no file; save it beside the records")
    if "\\" in image:
        raise BadSample("image not found", f"{image}: a path as Windows has it; say it with /")
    raise BadSample("image not found" if inside else "image outside the folder", str(image))


def is_forbidden(path: Path) -> bool:
    """Whether nobody tells us if a file is there."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def split_images(text: str) -> list[str | int]:
    """A data set's text -> a turn's parts: its `<image>` or `<|image|>` marks where an image goes.

    For the readers of data sets only: what a user types stays text.
    """
    parts = re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text)
    return [IMAGE if part in MARKS else part for part in parts if part]


def refuse_other_marks(asked: list[Turn]) -> None:
    """Raise BadSample where a question has another model's mark for an image. Without a mark of
    ours all images would stand before the first question, and the other be learnt as text."""
    for turn in asked:
        for part in turn.parts:
            if found := OTHER_IMAGE_MARKS.search(part):
                raise BadSample("not implemented", f"{found[0][:50]} in a question: an image's "
                                                   f"mark is {' or '.join(MARKS)}")


def conversation(images: list, turns: list[Turn], key: str) -> Example:
    """Image files and turns -> Example. Images without marks stand before the first user's text. A
    file of several pages is as many images, where its mark is.

    Raises BadSample, ImageError, and InputError where a package is missing.
    """
    asked = [turn for turn in turns if turn.role == "user"]
    answers = [turn for turn in turns if turn.role == "assistant"]
    marks = sum(turn.parts.count(IMAGE) for turn in asked)
    if images and marks == 0:
        refuse_other_marks(asked)
    if asked and marks == 0:
        asked[0].parts[:0] = [IMAGE] * len(images)
    elif marks != len(images):
        raise BadSample("missing field", f"{marks} marks for {len(images)} images")
    if not answers:
        raise BadSample("missing field", "no answer")
    if images and turns.index(answers[0]) < turns.index(asked[0]):
        raise BadSample("missing field", "images, and an answer before the first question")
    if not all(isinstance(turn.parts[0], str) for turn in answers):
        raise BadSample("missing field", "an answer that is no text")
    if not all(turn.parts[0].strip() for turn in answers):
        raise BadSample("empty answer", "nothing to learn")
    if not any(turn.is_learnt for turn in answers):
        raise BadSample("empty answer", "nothing to learn: no turn is to be learnt")
    pages = [read_pages(image) for image in images]
    files = iter(pages)
    for turn in asked:
        turn.parts = [part for mark in turn.parts
                      for part in ([IMAGE] * len(next(files)) if mark == IMAGE else [mark])]
    return Example([page for file in pages for page in file], turns, key)
