"""Damaged data: none of it ends or hangs a run, each piece is a hole of its kind, its neighbours are read."""
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
from sets import (FORMATS, PAGES, PEAK, add_member, encoded, no_hang, one_epoch, outcome, texts, tokenizer,
                  write_img2dataset, write_lines, write_parquet, write_texts)


def kinds_of(items):
    return Counter(item.kind for item in items if isinstance(item, Bad))


def in_one_file(name, folder):
    """A format's file to be damaged; the folder has its images."""
    write_img2dataset(folder, failures=False) if name == "img2dataset" else FORMATS[name](folder)
    return next(file for pattern in ("*.tar", "*.parquet", "*/*.parquet", "train.jsonl", "*.jsonl", "*.json")
                for file in sorted(folder.glob(pattern)) if not file.name.startswith("0000") or file.suffix == ".tar")


@pytest.mark.parametrize("tenths", range(10))
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_off(tmp_path, tokenizer, name, tenths):
    """What was whole before the cut is read, the rest is one hole: nobody knows how many samples it was."""
    path = in_one_file(name, tmp_path)
    whole, references = outcome(path, tokenizer), one_epoch(DataSet([str(path)], 0))
    assert not kinds_of(whole)
    good = path.read_bytes()
    length = len(good) * tenths // 10
    path.write_bytes(good[:length])
    other = tmp_path / "other.jsonl"                        # a data set with nothing to read would be an error
    write_texts(tmp_path, "other", 3)
    items = outcome([str(path), str(other)], tokenizer)
    read = [item for item in items if isinstance(item, Sample)]
    kind = "broken record" if path.suffix in (".json", ".jsonl") and length else "unreadable file"
    assert kinds_of(items) == {kind: 1}
    by_key = {s.key: s for s in whole}
    for s in read[:-3]:
        assert torch.equal(s.tokens, by_key[s.key].tokens) and torch.equal(s.pixels, by_key[s.key].pixels)
    if path.suffix == ".parquet":                           # its index is at the end
        assert len(read) == 3
    else:
        complete = sum(stop <= length for _, _, stop in references)
        assert complete - (path.suffix == ".tar") <= len(read) - 3 <= complete      # a tar's last may miss a member


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes(tmp_path, tokenizer, name):
    """Anything may come of 20 wrong bytes, but not an exception; 15 times."""
    path = in_one_file(name, tmp_path)
    good, other = path.read_bytes(), tmp_path / "other.jsonl"
    write_texts(tmp_path, "other", 3)
    for seed in range(15):
        rng, broken = random.Random(seed), bytearray(good)
        for _ in range(20):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        items = outcome([str(path), str(other)], tokenizer)
        assert sum(isinstance(item, Sample) for item in items) >= 3 and len(items) >= 4


@pytest.mark.parametrize("mode, kind", [
    ("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
    ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("F", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF"), ("P", "GIF")])
def test_images_of_any_mode_are_read(tmp_path, tokenizer, mode, kind):
    options = {"transparency": 0} if mode == "P" else {}
    (tmp_path / "page.png").write_bytes(encoded(Image.new(mode, (40, 30)), kind, **options))
    write_lines(tmp_path / "train.jsonl", [image_record("page.png")])
    [sample] = outcome(tmp_path / "train.jsonl", tokenizer)
    assert sample.pixels.shape == (1, 3, 112, 112)


def image_record(*names):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            "images": list(names)}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_images_cut_off(tmp_path, tokenizer, kind):
    good = encoded(Image.effect_noise((90, 90), 50), kind)
    for tenths in range(10):
        (tmp_path / f"{tenths}.png").write_bytes(good[:len(good) * tenths // 10])
    (tmp_path / "whole.png").write_bytes(good)
    write_lines(tmp_path / "train.jsonl", [image_record("whole.png"), *(image_record(f"{t}.png") for t in range(10))])
    first, *rest = outcome(tmp_path / "train.jsonl", tokenizer)
    assert isinstance(first, Sample) and kinds_of(rest) == {"unreadable image": 10}


def said(content, asked="?", more=""):
    """A line with this question and this answer as JSON, and more fields."""
    return '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": %s}]%s}' % (
        asked, content, more)


def shown(images, asked="?"):
    """A line with these images as JSON."""
    return said('"!"', asked, f', "images": {images}')


USER, TOLD = '{"role": "user", "content": "?"}', '{"role": "assistant", "content": "!"}'
BAD_LINES = {
    "half a record": (said('"!"')[:40], "broken record"),
    "two records": (said('"!"') * 2, "broken record"),
    "no JSON": ("these are words", "broken record"),
    "single quotes": (said('"!"').replace('"', "'"), "broken record"),
    "zeros": ("\0" * 300, "broken record"),
    "control character": (said('"\x01"'), "broken record"),
    "not UTF-8": (said('"').encode() + b'\xff\xfe"}]}', "broken record"),
    "Latin-1": (said('"Größe"').encode("latin-1"), "broken record"),
    "lone surrogate": (said(r'"\ud800"'), "broken record"),
    "lone surrogate, raw": (said('"').encode()[:-3] + b'\xed\xa0\x80"}]}', "broken record"),
    "lone surrogate in a question": (said('"!"').replace("?", r"\udfff"), "broken record"),
    "deep list": ("[" * 100_000, "broken record"),
    "deep object": ('{"a":' * 100_000, "broken record"),
    "deep and whole": ('{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}", "broken record"),
    "long number": ('{"messages": 1' + "0" * 5000 + "}", "broken record"),
    "a million spaces": (said(json.dumps(" " * 1_500_000 + "x")), "broken record"),
    "list": ("[1, 2]", "missing field"), "number": ("3", "missing field"), "null": ("null", "missing field"),
    "string": ('"messages"', "missing field"), "no keys": ("{}", "missing field"),
    "foreign keys": ('{"text": "a", "label": 3}', "missing field"),
    "null messages": ('{"messages": null}', "missing field"),
    "number of messages": ('{"messages": 3}', "missing field"),
    "no messages": ('{"messages": []}', "missing field"), "message of text": ('{"messages": "?"}', "missing field"),
    "null message": ('{"messages": [null]}', "missing field"),
    "nested": ('{"messages": [[%s, %s]]}' % (USER, TOLD), "missing field"),
    "message without content": ('{"messages": [%s, {"role": "assistant"}]}' % USER, "missing field"),
    "message without role": ('{"messages": [%s, {"content": "!"}]}' % USER, "missing field"),
    "foreign role": ('{"messages": [%s, %s, {"role": "tool", "content": ""}]}' % (USER, TOLD), "missing field"),
    "role in a list": ('{"messages": [%s, {"role": ["assistant"], "content": "!"}]}' % USER, "missing field"),
    "role in an object": ('{"messages": [%s, {"role": {}, "content": "!"}]}' % USER, "missing field"),
    "number for a role": ('{"messages": [%s, {"role": 1, "content": "!"}]}' % USER, "missing field"),
    "question alone": ('{"messages": [%s]}' % USER, "missing field"),
    "number for an answer": (said("3"), "missing field"), "null for an answer": (said("null"), "missing field"),
    "parts for an answer": (said('[{"type": "text", "text": "!"}]'), "missing field"),
    "true for an image": (said('"!"', more=', "image": true'), "missing field"),
    "number for images": (shown('7'), "missing field"),
    "null in images": (shown('[null]'), "missing field"),
    "numbers in images": (shown('[1, 2]'), "missing field"),
    "list in images": (shown('[["page.png"]]'), "missing field"),
    "mark without image": (said('"!"').replace("?", "<image>"), "missing field"),
    "more marks than images": (shown('["page.png"]', "<image><image>"), "missing field"),
    "fewer marks than images": (shown('["page.png", "page.png"]', "<image>"), "missing field"),
    "empty answer": (said('""'), "empty answer"), "white answer": (said(r'" \n\t"'), "empty answer"),
    "one of two answers empty": ('{"messages": [%s, %s, %s, %s]}' % (USER, TOLD, USER, TOLD.replace("!", "")),
                                 "empty answer"),
    "missing image": (shown('["gone.png"]'), "image not found"),
    "one missing image": (shown('["page.png", "gone.png"]'), "image not found"),
    "empty name in a list": (shown('[""]'), "image not found"),
    "folder for an image": (shown('["."]'), "image not found"),
    "object for an image": (shown('[{"bytes": "", "path": "page.png"}]'), "missing field"),
    "long name": (shown('["%s.png"]') % ("a" * 5000), "image not found"),
    "zero in a name": (shown(r'["a\u0000b.png"]'), "image not found"),
    "surrogate in a name": (shown(r'["a\ud800.png"]'), "image not found"),
    "URL": (shown('["https://example.com/a.png"]'), "image not found"),
    "image above the folder": (shown('["../x.png"]'), "image outside the folder"),
    "image above, by detours": (shown('["a/../../x.png"]'), "image outside the folder"),
    "absolute image": (shown('["/etc/passwd"]'), "image outside the folder"),
    "text for an image": (shown('["train.jsonl"]'), "unreadable image"),
    "too many images": (shown(json.dumps(["page.png"] * 40)), "too long"),
    "long question": (said('"!"').replace("?", "? " * 3000), "too long"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, tokenizer, name):
    line, kind = BAD_LINES[name]
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")         # it is there, and not the data set's
    Image.new("RGB", (50, 50)).save(folder / "page.png")
    good = shown('["page.png"]').encode()
    (folder / "train.jsonl").write_bytes(b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good]))
    items = outcome(folder, tokenizer)
    assert [getattr(item, "kind", "good") for item in items] == ["good", kind, "good"]
    assert "train.jsonl, line 2" in texts(folder, tokenizer).where(items[1])


@pytest.mark.parametrize("first", [b"these are words\n", b'"id": 1}\n', b"\n\n\n", b"\xef\xbb\xbf"],
                         ids=["words", "half", "empty lines", "BOM"])
def test_a_bad_first_line_costs_no_other(tmp_path, tokenizer, first):
    write_texts(tmp_path, "train", 5)
    path = tmp_path / "train.jsonl"
    path.write_bytes(first + path.read_bytes())
    items = outcome(tmp_path, tokenizer)
    assert sum(isinstance(item, Sample) for item in items) >= (4 if first == b"\xef\xbb\xbf" else 5)
    assert kinds_of(items) in ({}, {"broken record": 1})


@pytest.mark.parametrize("middle, kinds", [
    ('{"id": 1}', {"missing field": 1}), ('{"id": 1}, {"id": 2}, {"id": 3}', {"missing field": 3}),
    ("7", {"missing field": 1}), ('{"conversations": [}', {"broken record": 1}),
    ('{"conversations": []', {"broken record": 1}), ("words", {"broken record": 1}),
    ('{"conversations": [{"from": "gpt", "value": ""}]}', {"empty answer": 1}),
    ('{"a":' * 300_000, {"broken record": 1}), ("[" * 300_000, {"broken record": 1}),
    ('{"' * 300_000, {"broken record": 1})],
    ids=["foreign", "three foreign", "number", "broken", "unclosed", "words", "empty", "deep objects", "deep lists",
         "quotes"])
def test_bad_records_in_a_list(tmp_path, tokenizer, middle, kinds):
    good = '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'
    (tmp_path / "train.json").write_text(f"[{good}, {middle}, {good}]")
    items = outcome(tmp_path, tokenizer)
    assert kinds_of(items) == kinds
    assert isinstance(items[0], Sample) and isinstance(items[-1], Sample)


def pax_sparse(name, size):
    """The header of a sparse member that claims `size` bytes, none of them stored."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(size),
                        "GNU.sparse.map": "0,0"}
    return info.tobuf(tarfile.PAX_FORMAT)


def with_size(field, kind=tarfile.REGTYPE):
    """A header with these 12 bytes for a size, and the checksum that goes with it."""
    header = bytearray(tarfile.TarInfo("000001.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136], header[156:157] = field, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def members(*parts):
    """The bytes in a tar of (name, content or header's attributes)."""
    file = io.BytesIO()
    tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)
    for name, content in parts:
        add_member(tar, name, content) if isinstance(content, bytes) else add_member(tar, name, **content)
    return file.getvalue()          # never closed: no zeros at its end


PAGE = encoded(PAGES[0][0])
SYMLINK, LOOP = ({"type": tarfile.SYMTYPE, "linkname": name} for name in ("/etc/passwd", "1.jpg"))
HARDLINK = {"type": tarfile.LNKTYPE, "linkname": "gone"}
BAD_MEMBERS = {
    "no image": (members(("1.txt", b"caption")), {"missing field": 1}),
    "no caption": (members(("1.jpg", PAGE)), {"missing field": 1}),
    "caption in a list": (members(("1.jpg", PAGE), ("1.json", b'["caption"]')), {"missing field": 1}),
    "null caption": (members(("1.jpg", PAGE), ("1.json", b'{"caption": null}')), {"missing field": 1}),
    "foreign keys": (members(("1.jpg", PAGE), ("1.json", b'{"text": "a"}')), {"missing field": 1}),
    "broken JSON": (members(("1.jpg", PAGE), ("1.json", b'{"caption')), {"broken record": 1}),
    "deep JSON": (members(("1.jpg", PAGE), ("1.json", b"[" * 100_000)), {"broken record": 1}),
    "not UTF-8": (members(("1.jpg", PAGE), ("1.txt", b"\xff\xfe\xfd")), {"broken record": 1}),
    "empty caption": (members(("1.jpg", PAGE), ("1.txt", b"")), {"empty answer": 1}),
    "white caption": (members(("1.jpg", PAGE), ("1.txt", b" \n")), {"empty answer": 1}),
    "empty image": (members(("1.jpg", b""), ("1.txt", b"a")), {"unreadable image": 1}),
    "text for an image": (members(("1.jpg", b"words"), ("1.txt", b"a")), {"unreadable image": 1}),
    "half an image": (members(("1.jpg", PAGE[:300]), ("1.txt", b"a")), {"unreadable image": 1}),
    "foreign members": (members(("1.mp4", b"0"), ("1.cls", b"3")), {"missing field": 1}),
    "link": (members(("1.jpg", SYMLINK), ("1.txt", b"a")), {"missing field": 1}),
    "hard link": (members(("1.jpg", HARDLINK), ("1.txt", b"a")), {"missing field": 1}),
    "link to itself": (members(("1.jpg", LOOP), ("1.txt", b"a")), {"missing field": 1}),
    "device": (members(("1.jpg", {"type": tarfile.CHRTYPE}), ("1.txt", b"a")), {"missing field": 1}),
    "sparse terabyte": (pax_sparse("1.jpg", 2 ** 40) + members(("1.txt", b"a")), {"broken record": 1}),
}
# From one of these on nobody knows where a member begins.
BAD_HEADERS = {
    "8 GB": with_size(b"77777777777\0"), "a terabyte": with_size(b"\x80" + (2 ** 40).to_bytes(11, "big")),
    "2 ** 70 bytes": with_size(b"\x80" + (2 ** 70).to_bytes(11, "big")),
    "2 ** 63 bytes": with_size(b"\x80" + (2 ** 63).to_bytes(11, "big")),
    "-512 bytes": with_size(b"\xff" * 10 + b"\xfe\x00"), "-1024 bytes": with_size(b"\xff" * 10 + b"\xfc\x00"),
    "no number": with_size(b"words, words"),
    "wrong checksum": with_size(b"00000000000\0")[:-1] + b"x", "noise": bytes(range(256)) * 2,
    "broken pax": with_size(b"00000000010\0", tarfile.XHDTYPE) + b"0 a=b\n\0".ljust(512, b"\0"),
    "pax of 8 GB": with_size(b"77777777777\0", tarfile.XHDTYPE),
}


def tar_with(middle, folder):
    """Good sample, the middle, good sample."""
    good = [members((f"{i}.jpg", PAGE), (f"{i}.txt", b"caption")) for i in (0, 2)]
    (folder / "00000.tar").write_bytes(good[0] + middle + good[1] + bytes(1024))
    return folder


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members(tmp_path, tokenizer, name):
    middle, kinds = BAD_MEMBERS[name]
    items = outcome(tar_with(middle, tmp_path), tokenizer)
    assert kinds_of(items) == kinds
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


def column(values, kind):
    return pyarrow.array(values, kind)


NUMBER, TEXT = pyarrow.int64(), pyarrow.string()
IMAGES, LISTS = pyarrow.struct([("bytes", pyarrow.binary()), ("path", TEXT)]), pyarrow.list_(TEXT)
GOOD = {"image": ({"bytes": PAGE, "path": None}, IMAGES), "query": (["?"], LISTS), "annotations": (["!"], LISTS)}
BAD_CELLS = {
    "null image": ({"image": (None, IMAGES)}, "missing field"),
    "no bytes": ({"image": ({"bytes": None, "path": "a.png"}, IMAGES)}, "missing field"),
    "empty bytes": ({"image": ({"bytes": b"", "path": "a.png"}, IMAGES)}, "missing field"),
    "words for an image": ({"image": ({"bytes": b"words", "path": None}, IMAGES)}, "unreadable image"),
    "half an image": ({"image": ({"bytes": PAGE[:300], "path": None}, IMAGES)}, "unreadable image"),
    "null questions": ({"query": (None, LISTS)}, "missing field"),
    "null answers": ({"annotations": (None, LISTS)}, "missing field"),
    "no questions": ({"query": ([], LISTS)}, "missing field"),
    "no answers": ({"annotations": ([], LISTS)}, "missing field"),
    "null in questions": ({"query": ([None], LISTS)}, "missing field"),
    "null in answers": ({"annotations": ([None], LISTS)}, "missing field"),
    "empty answer": ({"annotations": ([""], LISTS)}, "empty answer"),
    "more answers than questions": ({"annotations": (["!", "?"], LISTS)}, "missing field"),
    "more questions than answers": ({"query": (["!", "?"], LISTS)}, "missing field"),
}
BAD_COLUMNS = {     # of another type than released ones have
    "path for an image": {"image": ("a.png", TEXT)},
    "bare bytes": {"image": (PAGE, pyarrow.binary())},
    "number for an image": {"image": (3, NUMBER)},
    "list of images": {"image": ([{"bytes": PAGE, "path": None}], pyarrow.list_(IMAGES))},
    "text for bytes": {"image": ({"bytes": "words", "path": None}, pyarrow.struct([("bytes", TEXT), ("path", TEXT)]))},
    "number for questions": {"query": (3, NUMBER)},
    "numbers for answers": {"annotations": ([3], pyarrow.list_(NUMBER))},
    "text for questions": {"query": ("what is it?", TEXT)},
    "text for both": {"query": ("abc", TEXT), "annotations": ("xyz", TEXT)},
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells(tmp_path, tokenizer, name):
    cells, kind = BAD_CELLS[name]
    rows = [GOOD, {**GOOD, **cells}, GOOD]
    columns = {key: column([row[key][0] for row in rows], GOOD[key][1]) for key in GOOD}
    write_parquet(tmp_path / "train.parquet", columns)
    assert [getattr(item, "kind", "good") for item in outcome(tmp_path, tokenizer)] == ["good", kind, "good"]


@pytest.mark.parametrize("cell", [[None], [None, "word"], [""], []], ids=str)
def test_bad_crossed_texts(tmp_path, tokenizer, cell):
    write_parquet(tmp_path / "train.parquet", {"stacked_image": column([GOOD["image"][0]] * 3, IMAGES),
                                               "crossed_text": column([["word"], cell, ["word"]], LISTS)})
    kind = "empty answer" if cell == [""] else "missing field"
    assert [getattr(item, "kind", "good") for item in outcome(tmp_path, tokenizer)] == ["good", kind, "good"]


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns(tmp_path, tokenizer, name):
    row = {**GOOD, **BAD_COLUMNS[name]}
    write_parquet(tmp_path / "train.parquet", {key: column([value] * 2, kind) for key, (value, kind) in row.items()})
    assert kinds_of(outcome(tmp_path, tokenizer)) == {"missing field": 2}


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("content", [
    b"", b"\n \n", b"garbage", bytes(4096), b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"{", b"[", b"[{]",
    bytes(257) + b"ustar" + bytes(300), b"\x1f\x8b\x08" + bytes(50), bytes(range(256)) * 30], ids=lambda b: repr(b[:8]))
def test_garbage_with_the_right_suffix_is_one_hole(tmp_path, tokenizer, suffix, content):
    """Beside a good file; alone it would stop the run at its start."""
    (tmp_path / f"a{suffix}").write_bytes(content)
    write_texts(tmp_path, "good", 3)
    items = outcome([str(tmp_path / f"a{suffix}"), str(tmp_path / "good.jsonl")], tokenizer)
    kind = "broken record" if content in (b"{", b"[", b"[{]") else "unreadable file"
    assert kinds_of(items) == {kind: 1} and sum(isinstance(item, Sample) for item in items) == 3


def test_a_folder_called_like_a_file_is_one_hole(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").mkdir()
    write_texts(tmp_path, "good", 3)
    for path in (tmp_path, tmp_path / "*"):
        items = outcome([str(path)], tokenizer)
        assert kinds_of(items) == {"unreadable file": 1} and len(items) == 4


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_bombs_cost_no_memory(tmp_path):
    """KB that claim gigabytes: an image of 100,000 x 100,000, profiles and texts that inflate, sparse members."""
    header = PAGE[:16] + (100_000).to_bytes(4, "big") * 2 + PAGE[24:29]
    size = PAGE[:8] + png_chunk(b"IHDR", header[16:]) + PAGE[33:]
    gigabyte = zlib.compress(bytes(2 ** 26)) * 16
    profile = PAGE[:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 ** 30 // 2))) + PAGE[33:]
    text = PAGE[:33] + png_chunk(b"zTXt", b"a\0\0" + gigabyte) + PAGE[33:]
    for name, image in {"size": size, "profile": profile, "text": text}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add_member(tar, "1.png", image)
            add_member(tar, "1.txt", b"caption")
    (tmp_path / "sparse.tar").write_bytes(pax_sparse("1.png", 2 ** 31) + members(("1.txt", b"a")) + bytes(1024))
    script = PEAK + """
import sys
sys.path.insert(0, sys.argv[1])
from plumbing.examples import BadSample
from plumbing.streams import DataSet
from plumbing.images import ImageError
grown = {}
for path in sys.argv[2:]:
    before = peak()
    try:
        DataSet([path], 0).read(0, *DataSet([path], 0).index(0)[0])
        kind = "good"
    except ImageError:
        kind = "unreadable image"
    except BadSample as bad:
        kind = bad.args[0]
    grown[path] = kind, peak() - before
print(grown)
"""
    paths = [str(tmp_path / f"{name}.tar") for name in ("size", "profile", "text", "sparse")]
    done = run("-c", script, ROOT, *paths, start=alone, timeout=100)
    grown = eval(done.stdout)
    assert {Path(path).stem: kind for path, (kind, _) in grown.items()}["size"] == "unreadable image"
    assert all(megabytes < 100 for _, megabytes in grown.values()), grown
