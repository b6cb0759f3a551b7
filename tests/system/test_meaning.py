"""What becomes of each form of a sample that could be read in two ways: read as meant, or a bad
sample of a named kind. Nothing ambiguous is learnt."""
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image

from data import IMAGE, Sample
from plumbing.examples import BadSample, Example
from plumbing.images import ImageError
from plumbing.streams import DataSet
from sets import (add_member, encoded, messages, no_hang, one_epoch, outcome,  # noqa: F401
                  stored, tokenizer, write_lines, write_parquet)

RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
BOM = b"\xef\xbb\xbf"


def read_all(path: Path) -> list[Example | str]:
    """An example, or the kind of a bad sample, in the order of the file."""
    data_set = DataSet([str(path)], seed=0)
    items = []
    for reference in sorted(one_epoch(data_set)):
        try:
            items.append(data_set.read(*reference))
        except BadSample as bad:
            items.append(bad.args[0])
        except ImageError:
            items.append("unreadable image")
    return items


def colour(image: Image.Image) -> str:
    red, _, blue = image.getpixel((9, 9))
    return "red" if red > blue else "blue"


def shown(item: Example | str) -> str:
    """What is learnt of a sample: `red ? !` is a red image, the question ? and the answer !, where
    [!] is an answer that is only read."""
    if isinstance(item, str):
        return item
    images = iter(item.images)
    said = []
    for turn in item.turns:
        for part in turn.parts:
            text = colour(next(images)) if part == IMAGE else part
            said.append(text if turn.is_learnt else f"[{text}]")
    return " ".join(said)


# --------------------------------------------------------------------------------------------------
# tar


JPG, PNG = encoded(RED, "JPEG"), encoded(BLUE)
TARS = {
    "as img2dataset": ([("1.jpg", JPG), ("1.txt", b"one"), ("1.json", b'{"caption": "one"}')],
                       ["red one"]),
    "another caption in the JSON": ([("1.jpg", JPG), ("1.txt", b"one"),
                                     ("1.json", b'{"caption": "two"}')], ["red one"]),
    "dates for names": ([("22.05.jpg", JPG), ("22.05.txt", b"one"),
                         ("22.06.png", PNG), ("22.06.txt", b"two")], ["red one", "blue two"]),
    "dates, one without its image": ([("22.05.jpg", JPG), ("22.06.txt", b"two")],
                                     ["missing field"] * 2),
    "versions for names": ([("v1.2.jpg", JPG), ("v1.3.png", PNG), ("v1.3.txt", b"two")],
                           ["missing field", "blue two"]),
    "dots in a folder": ([("a.b/1.jpg", JPG), ("a.b/1.txt", b"one"), ("a.c/1.png", PNG),
                          ("a.c/1.txt", b"two")], ["red one", "blue two"]),
    "the same name twice": ([("1.jpg", JPG), ("1.jpg", PNG), ("1.txt", b"one")], ["ambiguous"]),
    "two captions": ([("1.jpg", JPG), ("1.txt", b"one"), ("1.TXT", b"two")], ["ambiguous"]),
    "two images": ([("1.jpg", JPG), ("1.png", PNG), ("1.txt", b"one")], ["ambiguous"]),
    "two images, one a TIFF": ([("1.jpg", JPG), ("1.tiff", encoded(BLUE, "TIFF")),
                                ("1.txt", b"one")], ["ambiguous"]),
    "a TIFF": ([("1.tif", encoded(BLUE, "TIFF")), ("1.txt", b"one")], ["blue one"]),
    "a mask beside": ([("1.jpg", JPG), ("1.seg.png", PNG), ("1.txt", b"one")],
                      ["ambiguous", "missing field", "ambiguous"]),
    "a sample written again": ([("1.jpg", JPG), ("1.txt", b"one"), ("2.png", PNG),
                                ("2.txt", b"two"), ("1.jpg", PNG), ("1.txt", b"new")],
                               ["ambiguous", "blue two", "ambiguous"]),
    "written again by another name": ([("1.jpg", JPG), ("1.txt", b"one"), ("2.png", PNG),
                                       ("2.txt", b"two"), ("./1.txt", b"new")],
                                      ["ambiguous", "blue two", "ambiguous"]),
    "all images, then all captions": ([("1.jpg", JPG), ("2.png", PNG), ("1.txt", b"one"),
                                       ("2.txt", b"two")], ["ambiguous"] * 4),
    "a byte order mark": ([("1.jpg", JPG), ("1.txt", BOM + b"one")], ["red one"]),
    "a byte order mark alone": ([("1.jpg", JPG), ("1.txt", BOM)], ["empty answer"]),
    "a byte order mark in JSON": ([("1.jpg", JPG), ("1.json", BOM + b'{"caption": "one"}')],
                                  ["red one"]),
    "a mark in a caption": ([("1.jpg", JPG), ("1.txt", b"an <image> of")], ["red an <image> of"]),
    "two captions in JSON": ([("1.jpg", JPG), ("1.json", b'{"caption": "a", "caption": "b"}')],
                             ["ambiguous"]),
    "several pages": ([("1.tif", encoded(RED, "TIFF", save_all=True, append_images=[BLUE.copy()])),
                       ("1.txt", b"one")], ["red blue one"]),
}


@pytest.mark.parametrize("name", TARS)
def test_tar(tmp_path, name):
    members, expected = TARS[name]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member, content in members:
            add_member(tar, member, content)
    assert list(map(shown, read_all(tmp_path / "a.tar"))) == expected


# --------------------------------------------------------------------------------------------------
# Records: JSONL, one JSON list, and parquet


SAID = messages(("?", "!"))
LLAVA = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
OTHER = messages(("?", "no"))


def answered(**fields) -> dict:
    """Two answers, of which the first has more fields."""
    first, second = messages(("?", "a")), messages(("?", "b"))
    first[1] |= fields
    return {"messages": first + second}


def asked(question: str, **fields) -> dict:
    return {"messages": messages((question, "!")), **fields}


RECORDS = {
    "an image": ({"image": "red.png", "messages": SAID}, "red ? !"),
    "a list of one": ({"image": ["red.png"], "messages": SAID}, "red ? !"),
    "images null": ({"images": None, "image": "red.png", "messages": SAID}, "red ? !"),
    "images empty": ({"images": [], "image": "red.png", "messages": SAID}, "red ? !"),
    "image null": ({"images": ["red.png"], "image": None, "messages": SAID}, "red ? !"),
    "image an empty text": ({"images": ["red.png"], "image": "", "messages": SAID}, "red ? !"),
    "both null": ({"images": None, "image": None, "messages": SAID}, "? !"),
    "both, the same": ({"images": ["red.png"], "image": "red.png", "messages": SAID}, "red ? !"),
    "both, and they differ": ({"images": ["red.png"], "image": "blue.png", "messages": SAID},
                              "ambiguous"),
    "images more than image": ({"images": ["red.png", "blue.png"], "image": "red.png",
                                "messages": SAID}, "ambiguous"),
    "messages null": ({"messages": None, "conversations": LLAVA}, "? !"),
    "messages empty": ({"messages": [], "conversations": LLAVA}, "? !"),
    "conversations null": ({"messages": SAID, "conversations": None}, "? !"),
    "messages and others": ({"messages": OTHER, "conversations": LLAVA}, "ambiguous"),
    "content and value": ({"messages": [{"role": "user", "content": "?", "value": "no"}, SAID[1]]},
                          "ambiguous"),
    "value beside a null": ({"messages": [{"role": "user", "from": None, "content": None,
                                           "value": "?"}, SAID[1]]}, "? !"),
    "role and from": ({"messages": [{"role": "user", "from": "gpt", "content": "?"}, SAID[1]]},
                      "ambiguous"),
    "loss false": (answered(loss=False), "? [a] ? b"),
    "loss true": (answered(loss=True), "? a ? b"),
    "loss null": (answered(loss=None), "? a ? b"),
    "weight 0": (answered(weight=0), "? [a] ? b"),
    "weight 1": (answered(weight=1), "? a ? b"),
    "loss_scale 0": (answered(loss_scale=0.0), "? [a] ? b"),
    "half a weight": (answered(weight=0.5), "not implemented"),
    "loss as a text": (answered(loss="false"), "not implemented"),
    "nothing to learn": ({"messages": [SAID[0], {**SAID[1], "loss": False}]}, "empty answer"),
    "a tool's call": (answered(tool_calls=[{"id": "1"}]), "not implemented"),
    "no tool's call": (answered(tool_calls=None), "? a ? b"),
    "videos": (asked("?", videos=["a.mp4"]), "not implemented"),
    "video": (asked("?", video="a.mp4"), "not implemented"),
    "videos empty": (asked("?", videos=[]), "? !"),
    "audios": (asked("?", audios=["a.wav"]), "not implemented"),
    "objects": (asked("where is <ref-object>? <bbox>", image="red.png",
                      objects={"ref": ["it"], "bbox": [[1, 2, 3, 4]]}), "not implemented"),
    "objects without any": (asked("?", objects={"ref": [], "bbox": None}), "? !"),
    "a bbox of DocOwl's": (asked("what is in <bbox>1,2,3,4</bbox>?", image="red.png"),
                           "red what is in <bbox>1,2,3,4</bbox>? !"),
    "an image by another name": (asked("?", image_path="red.png"), "not implemented"),
    "no image, and one by another name": (asked("?", images=None, image_path="red.png"),
                                          "not implemented"),
    "images by another name": (asked("?", pictures=["a", "b.JPG"]), "not implemented"),
    "an image by another name beside": (asked("?", image="red.png", original="a.tif"), "red ? !"),
    "images as structs by another name": (asked("?", pics=[{"path": "a.png"}]), "not implemented"),
    "names that end as an image's": (asked("?", id="000/red.png", source="report.pdf",
                                           title="the image a.png"), "? !"),
    "generics and no image": (asked("why GetComponent<Image>()?"), "why GetComponent<Image>()? !"),
    "a mark of ours beside": (asked("<image> why <Image>?", image="red.png"),
                              "red  why <Image>? !"),
    "a text that begins with an answer": ({"messages": SAID[::-1]}, "! ?"),
    "a text for turns": ({"messages": "hello"}, "missing field"),
    "an image as bytes or a path": (asked("?", image={"bytes": None, "path": "red.png"}),
                                    "red ? !"),
    "an image as neither": (asked("?", image={"file": "red.png"}), "missing field"),
    "a path of Windows": (asked("?", image="img\\red.png"), "image not found"),
    "a data URI": (asked("?", image="data:image/png;base64,AAAA"), "image not found"),
    "an answer before the question": ({"image": "red.png", "messages": SAID[::-1]},
                                      "missing field"),
    "a text to go on with": ({"messages": [SAID[1]]}, "!"),
    "numbered marks": (asked("<image_1> or <image_2>?", images=["red.png", "blue.png"]),
                       "not implemented"),
    "Phi's marks": (asked("<|image_1|>\nwhich?", image="red.png"), "not implemented"),
    "Qwen's marks": (asked("<|vision_start|><|image_pad|><|vision_end|>?", image="red.png"),
                     "not implemented"),
    "a mark in capitals": (asked("<IMAGE>what?", image="red.png"), "not implemented"),
    "a mark with spaces": (asked("< image >what?", image="red.png"), "not implemented"),
    "no mark": (asked("<images> or <image_url>?", image="red.png"),
                "red <images> or <image_url>? !"),
    "a mark of a video": (asked("<video>what?"), "not implemented"),
    "a mark of audio": (asked("<audio>what?"), "not implemented"),
    "an image's name in a mark": (asked("<img>red.png</img>what?"), "not implemented"),
    "an image in an answer": ({"image": "red.png", "messages": messages(("?", "see <image>"))},
                              "not implemented"),
    "a text about marks": ({"messages": messages(("?", "see <image>"))}, "? see <image>"),
    "a system message beside": (asked("?", system="Be brief."), "not implemented"),
    "an answer that is rejected": (asked("?", rejected_response="no"), "not implemented"),
    "an answer that is bad": (asked("?", label=False), "not implemented"),
    "several pages": ({"image": "pages.tif", "messages": SAID}, "red blue ? !"),
    "several pages at a mark": ({"images": ["red.png", "pages.tif", "blue.png"], "messages":
                                 messages(("a <image> b <image> c", "!"), ("<image>?", "!"))},
                                "a  red  b  red blue  c ! blue ? !"),
    "DocDownstream's fields": (asked("<|image|>?", image=["./red.png"], task_name="qa_sft",
                                     dataset_name="DocVQA"), "red ? !"),
}


@pytest.fixture
def folder(tmp_path):
    RED.save(tmp_path / "red.png")
    BLUE.save(tmp_path / "blue.png")
    RED.save(tmp_path / "pages.tif", save_all=True, append_images=[BLUE.copy()])
    return tmp_path


@pytest.mark.parametrize("name", RECORDS)
def test_json(folder, name):
    """The same of a line and of a list's record, with good ones around it."""
    record, expected = RECORDS[name]
    good = {"messages": messages(("good", "!"))}
    write_lines(folder / "a.jsonl", [good, record, good])
    (folder / "a.json").write_text(json.dumps([good, record, good], indent=1))
    for file in ("a.jsonl", "a.json"):
        assert list(map(shown, read_all(folder / file))) == ["good !", expected, "good !"]


@pytest.mark.parametrize("line", [
    '{"image": "red.png", "image": "blue.png", "messages": %s}',
    '{"messages": [], "image": "red.png", "messages": %s}',
    '{"image": "red.png", "messages": %s, "messages": null}'])
def test_two_values_for_one_key(folder, line):
    for file, form in [("a.jsonl", "%s\n"), ("a.json", "[%s]")]:
        (folder / file).write_text(form % (line % json.dumps(SAID)))
        assert read_all(folder / file) == ["ambiguous"]


NOT_IN_PARQUET = {"content and value", "value beside a null", "role and from", "loss as a text"}


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - NOT_IN_PARQUET))
def test_parquet_of_records(folder, name):
    """LLaVA's and MS-Swift's records as rows, their images named."""
    record, expected = RECORDS[name]
    write_parquet(folder / "a.parquet", {key: [value] * 2 for key, value in record.items()})
    assert list(map(shown, read_all(folder / "a.parquet"))) == [expected] * 2


IMAGES = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def test_llavas_parquet(tmp_path, tokenizer):
    """As LLaVA-NeXT-Data is published: images inside, and none for text alone."""
    with_mark = [{"from": "human", "value": "<image>\n?"}, LLAVA[1]]
    columns = {"id": ["a", "b", "c", "d"],
               "conversations": [with_mark, LLAVA, with_mark, LLAVA],
               "data_source": ["-"] * 4,
               "image": pyarrow.array([stored(RED), None, None, stored(BLUE)], IMAGES)}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", columns)
    assert list(map(shown, read_all(tmp_path))) == ["red \n? !", "? !", "missing field",
                                                    "blue ? !"]
    items = outcome(tmp_path, tokenizer)
    assert [isinstance(item, Sample) for item in items] == [True, True, False, True]


# Queries and answers of BigDocs, and what becomes of them.
QUERIES = {
    "a page": (["?"], ["!"], "blue ? !"),
    "a mark": (["look: <image>?"], ["!"], "look:  blue ? !"),
    "a mark in a later query": (["?", "what does <image> mean?"], ["!", "a tag"],
                                "blue ? ! what does <image> mean? a tag"),
    "the other mark in a later query": (["?", "<|image|>"], ["!", "."], "blue ? ! <|image|> ."),
    "a mark in an answer": (["?"], ["<image>"], "blue ? <image>"),
    "two marks": (["<image> or <image>?"], ["!"], "missing field"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_bigdocs(tmp_path, name):
    query, annotations, expected = QUERIES[name]
    write_parquet(tmp_path / "a.parquet", {"image": [stored(BLUE)], "query": [query],
                                           "annotations": [annotations]})
    assert list(map(shown, read_all(tmp_path / "a.parquet"))) == [expected]


def test_columns_of_two_formats_or_of_one_name(tmp_path):
    page, lists = pyarrow.array([stored(BLUE)], IMAGES), pyarrow.array([["?"]])
    both = {"image": page, "query": lists, "annotations": lists, "messages": [SAID]}
    write_parquet(tmp_path / "a.parquet", both)
    assert read_all(tmp_path / "a.parquet") == ["ambiguous"]
    table = pyarrow.table([page, lists, lists, lists],
                          names=["image", "query", "annotations", "query"])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    (tmp_path / "a.parquet").write_bytes(file.getvalue())
    assert read_all(tmp_path / "a.parquet") == ["ambiguous"]
