"""Damaged data: none of it ends or hangs a run, each piece is a Bad of its kind, its neighbours are
read."""
import io
import json
import random
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image

from conftest import ROOT, alone, run
from data import Sample
from plumbing.streams import Bad, DataSet
from sets import (FORMATS, PAGES, PEAK, add_member, documents_of, encoded, messages,  # noqa: F401
                  no_hang, one_epoch, outcome, tokenizer, write_img2dataset, write_lines,
                  write_parquet, write_texts)


def kinds_of(items: list[Sample | Bad]) -> Counter:
    return Counter(item.kind for item in items if isinstance(item, Bad))


def good_or_kind(items: list[Sample | Bad]) -> list[str]:
    return [item.kind if isinstance(item, Bad) else "good" for item in items]


def in_one_file(name: str, folder: Path) -> Path:
    """A format's file to be damaged; the folder has its images."""
    if name == "img2dataset":
        write_img2dataset(folder, failures=False)
        return folder / "00000.tar"
    FORMATS[name](folder)
    for pattern in ("*.parquet", "*/*.parquet", "train.jsonl", "*.jsonl", "*.json"):
        for file in sorted(folder.glob(pattern)):
            return file


@pytest.mark.parametrize("tenths", range(10))
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_off(tmp_path, tokenizer, name, tenths):
    """What was whole before the cut is read, the rest is one Bad: nobody knows how many samples it
    was."""
    path = in_one_file(name, tmp_path)
    whole = outcome(path, tokenizer)
    references = one_epoch(DataSet([str(path)], 0))
    assert not kinds_of(whole)
    good = path.read_bytes()
    length = len(good) * tenths // 10
    path.write_bytes(good[:length])
    other = tmp_path / "other.jsonl"            # a data set with nothing to read would be an error
    write_texts(tmp_path, "other", 3)
    items = outcome([str(path), str(other)], tokenizer)
    is_json = path.suffix in (".json", ".jsonl")
    kind = "broken record" if is_json and length else "unreadable file"
    assert kinds_of(items) == {kind: 1}
    read = [item for item in items if isinstance(item, Sample)][:-3]
    by_key = {sample.key: sample for sample in whole}
    for sample in read:
        assert torch.equal(sample.tokens, by_key[sample.key].tokens)
        assert torch.equal(sample.pixels, by_key[sample.key].pixels)
    if path.suffix == ".parquet":               # its index is at the end
        assert not read
    else:
        complete = sum(stop <= length for _, _, stop in references)
        fewest = complete - (path.suffix == ".tar")         # a tar's last may miss a member
        assert fewest <= len(read) <= complete


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes(tmp_path, tokenizer, name):
    """Anything may come of 20 wrong bytes, but not an exception; 15 times."""
    path = in_one_file(name, tmp_path)
    good = path.read_bytes()
    other = tmp_path / "other.jsonl"
    write_texts(tmp_path, "other", 3)
    for seed in range(15):
        rng = random.Random(seed)
        broken = bytearray(good)
        for _ in range(20):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        items = outcome([str(path), str(other)], tokenizer)
        assert sum(isinstance(item, Sample) for item in items) >= 3 and len(items) >= 4


# --------------------------------------------------------------------------------------------------
# Images


def image_record(*names: str) -> dict:
    return {"messages": messages(("?", "!")), "images": list(names)}


def test_an_image_is_read_whatever_its_mode_and_its_name(tmp_path, tokenizer):
    """A CMYK JPEG that is called PNG. Other modes are in test_images.py."""
    (tmp_path / "page.png").write_bytes(encoded(Image.new("CMYK", (40, 30)), "JPEG"))
    write_lines(tmp_path / "train.jsonl", [image_record("page.png")])
    [sample] = outcome(tmp_path / "train.jsonl", tokenizer)
    assert sample.pixels.shape == (1, 3, 112, 112)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_images_cut_off(tmp_path, tokenizer, kind):
    good = encoded(Image.effect_noise((90, 90), 50), kind)
    for tenths in range(10):
        (tmp_path / f"{tenths}.png").write_bytes(good[:len(good) * tenths // 10])
    (tmp_path / "whole.png").write_bytes(good)
    names = ["whole.png", *(f"{tenths}.png" for tenths in range(10))]
    write_lines(tmp_path / "train.jsonl", [image_record(name) for name in names])
    first, *rest = outcome(tmp_path / "train.jsonl", tokenizer)
    assert isinstance(first, Sample) and kinds_of(rest) == {"unreadable image": 10}


# --------------------------------------------------------------------------------------------------
# JSON


def said(content: str, asked: str = "?", more: str = "") -> str:
    """A line with this question and this answer as JSON, and more fields."""
    user = '{"role": "user", "content": "%s"}' % asked
    told = '{"role": "assistant", "content": %s}' % content
    return '{"messages": [%s, %s]%s}' % (user, told, more)


def shown(images: str, asked: str = "?") -> str:
    """A line with these images as JSON."""
    return said('"!"', asked, f', "images": {images}')


USER = '{"role": "user", "content": "?"}'
TOLD = '{"role": "assistant", "content": "!"}'


def turns(*texts: str) -> str:
    """A line with these turns as JSON."""
    return '{"messages": [%s]}' % ", ".join(texts)


def with_role(role: str) -> str:
    """A line whose answer has this role, as JSON."""
    return turns(USER, '{"role": %s, "content": "!"}' % role)


BROKEN_RECORDS = {
    "half a record": said('"!"')[:40],
    "two records": said('"!"') * 2,
    "no JSON": "these are words",
    "single quotes": said('"!"').replace('"', "'"),
    "zeros": "\0" * 300,
    "control character": said('"\x01"'),
    "not UTF-8": said('"').encode() + b'\xff\xfe"}]}',
    "Latin-1": said('"Größe"').encode("latin-1"),
    "lone surrogate": said(r'"\ud800"'),
    "lone surrogate, raw": said('"').encode()[:-3] + b'\xed\xa0\x80"}]}',
    "lone surrogate in a question": said('"!"', asked=r"\udfff"),
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "deep and whole": '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "long number": '{"messages": 1' + "0" * 5000 + "}",
    "a million spaces": said(json.dumps(" " * 1_500_000 + "x")),
}
MISSING_FIELDS = {
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "string": '"messages"',
    "no keys": "{}",
    "foreign keys": '{"text": "a", "label": 3}',
    "null messages": '{"messages": null}',
    "number of messages": '{"messages": 3}',
    "no messages": '{"messages": []}',
    "message of text": '{"messages": "?"}',
    "null message": '{"messages": [null]}',
    "nested": turns("[%s, %s]" % (USER, TOLD)),
    "message without content": turns(USER, '{"role": "assistant"}'),
    "message without role": turns(USER, '{"content": "!"}'),
    "foreign role": turns(USER, TOLD, '{"role": "tool", "content": ""}'),
    "role in a list": with_role('["assistant"]'),
    "role in an object": with_role("{}"),
    "number for a role": with_role("1"),
    "question alone": turns(USER),
    "number for an answer": said("3"),
    "null for an answer": said("null"),
    "parts for an answer": said('[{"type": "text", "text": "!"}]'),
    "true for an image": said('"!"', more=', "image": true'),
    "number for images": shown("7"),
    "null in images": shown("[null]"),
    "numbers in images": shown("[1, 2]"),
    "list in images": shown('[["page.png"]]'),
    "object for an image": shown('[{"bytes": "", "file": "page.png"}]'),
    "mark without image": said('"!"', asked="<image>"),
    "more marks than images": shown('["page.png"]', "<image><image>"),
    "fewer marks than images": shown('["page.png", "page.png"]', "<image>"),
}
EMPTY_ANSWERS = {
    "empty answer": said('""'),
    "white answer": said(r'" \n\t"'),
    "one of two answers empty": turns(USER, TOLD, USER, TOLD.replace("!", "")),
}
NO_IMAGES = {
    "missing image": shown('["gone.png"]'),
    "one missing image": shown('["page.png", "gone.png"]'),
    "empty name in a list": shown('[""]'),
    "folder for an image": shown('["."]'),
    "long name": shown('["%s.png"]' % ("a" * 5000)),
    "zero in a name": shown(r'["a\u0000b.png"]'),
    "surrogate in a name": shown(r'["a\ud800.png"]'),
    "URL": shown('["https://example.com/a.png"]'),
}
OUTSIDE = {
    "image above the folder": shown('["../x.png"]'),
    "image above, by detours": shown('["a/../../x.png"]'),
    "absolute image": shown('["/etc/passwd"]'),
}
TOO_LONG = {
    "too many images": shown(json.dumps(["page.png"] * 40)),
    "long question": said('"!"', asked="? " * 3000),
}
BY_KIND = {
    "broken record": BROKEN_RECORDS, "missing field": MISSING_FIELDS, "empty answer": EMPTY_ANSWERS,
    "image not found": NO_IMAGES, "image outside the folder": OUTSIDE,
    "unreadable image": {"text for an image": shown('["train.jsonl"]')}, "too long": TOO_LONG,
}
BAD_LINES = {name: (line, kind) for kind, lines in BY_KIND.items() for name, line in lines.items()}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, tokenizer, name):
    line, kind = BAD_LINES[name]
    folder = tmp_path / "set"
    folder.mkdir()
    page = Image.new("RGB", (50, 50))
    page.save(folder / "page.png")
    page.save(tmp_path / "x.png")           # it is there, and not the data set's
    good = shown('["page.png"]').encode()
    line = line if isinstance(line, bytes) else line.encode()
    (folder / "train.jsonl").write_bytes(b"\n".join([good, line, good]))
    items = outcome(folder, tokenizer)
    assert good_or_kind(items) == ["good", kind, "good"]
    assert "train.jsonl, line 2" in documents_of(folder, tokenizer).where(items[1])


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("first", [b"these are words\n", b'"id": 1}\n', b"\n\n\n", BOM],
                         ids=["words", "half", "empty lines", "BOM"])
def test_a_bad_first_line_costs_no_other(tmp_path, tokenizer, first):
    write_texts(tmp_path, "train", 5)
    path = tmp_path / "train.jsonl"
    path.write_bytes(first + path.read_bytes())
    items = outcome(tmp_path, tokenizer)
    assert sum(isinstance(item, Sample) for item in items) >= (4 if first == BOM else 5)
    assert kinds_of(items) in ({}, {"broken record": 1})


BAD_IN_A_LIST = {
    "foreign": ('{"id": 1}', {"missing field": 1}),
    "three foreign": ('{"id": 1}, {"id": 2}, {"id": 3}', {"missing field": 3}),
    "number": ("7", {"missing field": 1}),
    "broken": ('{"conversations": [}', {"broken record": 1}),
    "unclosed": ('{"conversations": []', {"broken record": 1}),
    "words": ("words", {"broken record": 1}),
    "empty": ('{"conversations": [{"from": "gpt", "value": ""}]}', {"empty answer": 1}),
    "deep objects": ('{"a":' * 300_000, {"broken record": 1}),
    "deep lists": ("[" * 300_000, {"broken record": 1}),
    "quotes": ('{"' * 300_000, {"broken record": 1}),
}


@pytest.mark.parametrize("name", BAD_IN_A_LIST)
def test_bad_records_in_a_list(tmp_path, tokenizer, name):
    middle, kinds = BAD_IN_A_LIST[name]
    said = '[{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]'
    good = '{"conversations": %s}' % said
    (tmp_path / "train.json").write_text(f"[{good}, {middle}, {good}]")
    items = outcome(tmp_path, tokenizer)
    assert kinds_of(items) == kinds
    assert isinstance(items[0], Sample) and isinstance(items[-1], Sample)


# --------------------------------------------------------------------------------------------------
# tar


def pax_sparse(name: str, size: int) -> bytes:
    """The header of a sparse member that claims `size` bytes, none of them stored."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1",
                        "GNU.sparse.size": str(size), "GNU.sparse.map": "0,0"}
    return info.tobuf(tarfile.PAX_FORMAT)


def with_size(field: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with these 12 bytes for a size, and the checksum that goes with it."""
    header = bytearray(tarfile.TarInfo("000001.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136] = field
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def base256(number: int) -> bytes:
    """A size of more than 8 GB, as GNU's tar writes it; a negative one, as nobody should."""
    sign = b"\x80" if number >= 0 else b"\xff"
    return sign + number.to_bytes(11, "big", signed=number < 0)


def members(*parts: tuple[str, bytes | dict]) -> bytes:
    """The bytes in a tar of (name, content or header's attributes)."""
    file = io.BytesIO()
    tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)
    for name, content in parts:
        if isinstance(content, bytes):
            add_member(tar, name, content)
        else:
            add_member(tar, name, **content)
    return file.getvalue()          # never closed: no zeros at its end


PAGE = encoded(PAGES[0][0])
SYMLINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
LOOP = {"type": tarfile.SYMTYPE, "linkname": "1.jpg"}
HARDLINK = {"type": tarfile.LNKTYPE, "linkname": "gone"}
TEXT_MEMBER = ("1.txt", b"a")


def with_image(image: bytes | dict) -> bytes:
    return members(("1.jpg", image), TEXT_MEMBER)


def with_caption(name: str, caption: bytes) -> bytes:
    return members(("1.jpg", PAGE), (name, caption))


BAD_MEMBERS = {
    "no image": (members(("1.txt", b"caption")), "missing field"),
    "no caption": (members(("1.jpg", PAGE)), "missing field"),
    "caption in a list": (with_caption("1.json", b'["caption"]'), "missing field"),
    "null caption": (with_caption("1.json", b'{"caption": null}'), "missing field"),
    "foreign keys": (with_caption("1.json", b'{"text": "a"}'), "missing field"),
    "broken JSON": (with_caption("1.json", b'{"caption'), "broken record"),
    "deep JSON": (with_caption("1.json", b"[" * 100_000), "broken record"),
    "not UTF-8": (with_caption("1.txt", b"\xff\xfe\xfd"), "broken record"),
    "empty caption": (with_caption("1.txt", b""), "empty answer"),
    "white caption": (with_caption("1.txt", b" \n"), "empty answer"),
    "empty image": (with_image(b""), "unreadable image"),
    "text for an image": (with_image(b"words"), "unreadable image"),
    "half an image": (with_image(PAGE[:300]), "unreadable image"),
    "foreign members": (members(("1.mp4", b"0"), ("1.cls", b"3")), "missing field"),
    "link": (with_image(SYMLINK), "missing field"),
    "hard link": (with_image(HARDLINK), "missing field"),
    "link to itself": (with_image(LOOP), "missing field"),
    "device": (with_image({"type": tarfile.CHRTYPE}), "missing field"),
    "sparse terabyte": (pax_sparse("1.jpg", 2 ** 40) + members(TEXT_MEMBER), "broken record"),
}
# From one of these on nobody knows where a member begins.
BAD_HEADERS = {
    "8 GB": with_size(b"77777777777\0"),
    "a terabyte": with_size(base256(2 ** 40)),
    "2 ** 70 bytes": with_size(base256(2 ** 70)),
    "2 ** 63 bytes": with_size(base256(2 ** 63)),
    "-512 bytes": with_size(base256(-512)),
    "-1024 bytes": with_size(base256(-1024)),
    "no number": with_size(b"words, words"),
    "wrong checksum": with_size(b"00000000000\0")[:-1] + b"x",
    "noise": bytes(range(256)) * 2,
    "broken pax": with_size(b"00000000010\0", tarfile.XHDTYPE) + b"0 a=b\n\0".ljust(512, b"\0"),
    "pax of 8 GB": with_size(b"77777777777\0", tarfile.XHDTYPE),
}


def tar_with(middle: bytes, folder: Path) -> Path:
    """Good sample, the middle, good sample."""
    first, last = (members((f"{i}.jpg", PAGE), (f"{i}.txt", b"caption")) for i in (0, 2))
    (folder / "00000.tar").write_bytes(first + middle + last + bytes(1024))
    return folder


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members(tmp_path, tokenizer, name):
    middle, kind = BAD_MEMBERS[name]
    items = outcome(tar_with(middle, tmp_path), tokenizer)
    assert kinds_of(items) == {kind: 1}
    assert isinstance(items[0], Sample) and isinstance(items[-1], Sample)


def test_a_tars_folders_are_no_samples(tmp_path, tokenizer):
    folders = [("./", {"type": tarfile.DIRTYPE}), ("./a/", {"type": tarfile.DIRTYPE})]
    tar_with(members(*folders, ("./a/1.jpg", PAGE), ("./a/1.txt", b"b")), tmp_path)
    assert [type(item) for item in outcome(tmp_path, tokenizer)] == [Sample] * 3


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers(tmp_path, tokenizer, name):
    items = outcome(tar_with(BAD_HEADERS[name], tmp_path), tokenizer)
    assert kinds_of(items) == {"unreadable file": 1}
    assert len(items) == 1 or isinstance(items[0], Sample)


# --------------------------------------------------------------------------------------------------
# parquet


NUMBER = pyarrow.int64()
TEXT = pyarrow.string()
LISTS = pyarrow.list_(TEXT)
IMAGES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", TEXT)])
STORED = {"bytes": PAGE, "path": None}
GOOD = {"image": STORED, "query": ["?"], "annotations": ["!"]}
TYPES = {"image": IMAGES, "query": LISTS, "annotations": LISTS}
BAD_CELLS = {
    "null image": ({"image": None}, "missing field"),
    "no bytes": ({"image": {"bytes": None, "path": "a.png"}}, "missing field"),
    "empty bytes": ({"image": {"bytes": b"", "path": "a.png"}}, "missing field"),
    "words for an image": ({"image": {"bytes": b"words", "path": None}}, "unreadable image"),
    "half an image": ({"image": {"bytes": PAGE[:300], "path": None}}, "unreadable image"),
    "null questions": ({"query": None}, "missing field"),
    "null answers": ({"annotations": None}, "missing field"),
    "no questions": ({"query": []}, "missing field"),
    "no answers": ({"annotations": []}, "missing field"),
    "null in questions": ({"query": [None]}, "missing field"),
    "null in answers": ({"annotations": [None]}, "missing field"),
    "empty answer": ({"annotations": [""]}, "empty answer"),
    "more answers than questions": ({"annotations": ["!", "?"]}, "missing field"),
    "more questions than answers": ({"query": ["!", "?"]}, "missing field"),
}
TEXT_FOR_BYTES = pyarrow.struct([("bytes", TEXT), ("path", TEXT)])
BAD_COLUMNS = {     # (value, type) of another type than released ones have
    "path for an image": {"image": ("a.png", TEXT)},
    "bare bytes": {"image": (PAGE, pyarrow.binary())},
    "number for an image": {"image": (3, NUMBER)},
    "list of images": {"image": ([STORED], pyarrow.list_(IMAGES))},
    "text for bytes": {"image": ({"bytes": "words", "path": None}, TEXT_FOR_BYTES)},
    "number for questions": {"query": (3, NUMBER)},
    "numbers for answers": {"annotations": ([3], pyarrow.list_(NUMBER))},
    "text for questions": {"query": ("what is it?", TEXT)},
    "text for both": {"query": ("abc", TEXT), "annotations": ("xyz", TEXT)},
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells(tmp_path, tokenizer, name):
    cells, kind = BAD_CELLS[name]
    rows = [GOOD, {**GOOD, **cells}, GOOD]
    columns = {key: pyarrow.array([row[key] for row in rows], TYPES[key]) for key in GOOD}
    write_parquet(tmp_path / "train.parquet", columns)
    assert good_or_kind(outcome(tmp_path, tokenizer)) == ["good", kind, "good"]


@pytest.mark.parametrize("cell", [[None], [None, "word"], [""], []], ids=str)
def test_bad_crossed_texts(tmp_path, tokenizer, cell):
    columns = {"stacked_image": pyarrow.array([STORED] * 3, IMAGES),
               "crossed_text": pyarrow.array([["word"], cell, ["word"]], LISTS)}
    write_parquet(tmp_path / "train.parquet", columns)
    kind = "empty answer" if cell == [""] else "missing field"
    assert good_or_kind(outcome(tmp_path, tokenizer)) == ["good", kind, "good"]


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns(tmp_path, tokenizer, name):
    row = {key: (GOOD[key], TYPES[key]) for key in GOOD} | BAD_COLUMNS[name]
    columns = {key: pyarrow.array([value] * 2, kind) for key, (value, kind) in row.items()}
    write_parquet(tmp_path / "train.parquet", columns)
    assert kinds_of(outcome(tmp_path, tokenizer)) == {"missing field": 2}


# --------------------------------------------------------------------------------------------------
# Anything


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("content", [
    b"", b"\n \n", b"garbage", bytes(4096), b"PAR1", b"PAR1" + bytes(100) + b"PAR1",
    b"{", b"[", b"[{]", bytes(257) + b"ustar" + bytes(300), b"\x1f\x8b\x08" + bytes(50),
    bytes(range(256)) * 30], ids=lambda content: repr(content[:8]))
def test_garbage_with_the_right_suffix_is_one_bad_sample(tmp_path, tokenizer, suffix, content):
    """Beside a good file; alone it would stop the run at its start."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    write_texts(tmp_path, "good", 3)
    items = outcome([str(path), str(tmp_path / "good.jsonl")], tokenizer)
    kind = "broken record" if content in (b"{", b"[", b"[{]") else "unreadable file"
    assert kinds_of(items) == {kind: 1} and len(items) == 4


def test_a_folder_called_like_a_file_is_one_bad_sample(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").mkdir()
    write_texts(tmp_path, "good", 3)
    for path in (tmp_path, tmp_path / "*"):
        items = outcome(path, tokenizer)
        assert kinds_of(items) == {"unreadable file": 1} and len(items) == 4


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


# Reads the first sample of each tar: prints its kind and by how many MB the process has grown.
BOMB_READER = PEAK + """
import json
import sys
sys.path.insert(0, sys.argv[1])
from plumbing.examples import BadSample
from plumbing.images import ImageError
from plumbing.streams import DataSet

grown = {}
for path in sys.argv[2:]:
    before = peak()
    data_set = DataSet([path], 0)
    try:
        data_set.read(0, *data_set.index(0)[0])
        kind = "good"
    except ImageError:
        kind = "unreadable image"
    except BadSample as bad:
        kind = bad.args[0]
    grown[path] = kind, peak() - before
print(json.dumps(grown))
"""


def test_bombs_cost_no_memory(tmp_path):
    """KB that claim gigabytes: an image of 100,000 x 100,000, profiles and texts that inflate,
    sparse members."""
    signature, header, rest = PAGE[:8], PAGE[8:33], PAGE[33:]
    huge = (100_000).to_bytes(4, "big") * 2 + PAGE[24:29]       # width, height, how it is stored
    profile = b"a\0\0" + zlib.compress(bytes(2 ** 30 // 2))
    text = b"a\0\0" + zlib.compress(bytes(2 ** 26)) * 16
    images = {"size": signature + png_chunk(b"IHDR", huge) + rest,
              "profile": signature + header + png_chunk(b"iCCP", profile) + rest,
              "text": signature + header + png_chunk(b"zTXt", text) + rest}
    for name, image in images.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add_member(tar, "1.png", image)
            add_member(tar, "1.txt", b"caption")
    sparse = pax_sparse("1.png", 2 ** 31) + members(TEXT_MEMBER) + bytes(1024)
    (tmp_path / "sparse.tar").write_bytes(sparse)
    paths = [str(tmp_path / f"{name}.tar") for name in (*images, "sparse")]
    done = run("-c", BOMB_READER, ROOT, *paths, start=alone, timeout=100)
    grown = json.loads(done.stdout)
    assert grown[paths[0]][0] == "unreadable image"
    assert all(megabytes < 100 for _, megabytes in grown.values()), grown
