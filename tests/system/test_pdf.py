"""PDF wherever an image is taken: its pages drawn as they look, some of them, and hostile files."""
import base64
import csv
import io
import json
import os
import re
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from conftest import sample
from data import IMAGE, Sample
from paper.benchmarks import open_benchmark
from pdfs import LETTER, RED, encrypted_pdf, nested_forms, pdf_bytes, stream
from plumbing import pdf
from plumbing.folders import image_files
from plumbing.images import read_image, read_pages
from plumbing.settings import ImageError, InputError
from plumbing.streams import Bad, Documents
from sets import (PAGES, add_member, documents_of, encoded, messages, no_hang,  # noqa: F401
                  one_epoch, tokenizer, write_lines, write_parquet)
from shipped import PAGE as A_PAGE

WHITE, PURE = (255, 255, 255), (255, 0, 0)
# The shipped model reads it also after the PDF has made a JPEG of it.
PAGE = A_PAGE.with_name("office-4-form.png")
PROMPT, ANSWER = "what is the room?", "2.14"
TOY = PAGES[:3]         # (image, its text, prompt, answer) each


def printed(*images: Image.Image) -> bytes:
    """Images as a PDF of 200 dots an inch, in which each pixel is one again. (At exactly 200 PDFium
    would stretch some by one, since their size is rounded.)"""
    file = io.BytesIO()
    first, *others = [image.copy() for image in images]     # saving leaves settings in an image
    first.save(file, "PDF", resolution=200.1, save_all=True, append_images=others, quality=100)
    return file.getvalue()


def pages_of(data: bytes, chosen: str | None = None) -> list[Image.Image]:
    return read_pages(io.BytesIO(data), chosen)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A PDF of three of the toy's pages."""
    path = tmp_path_factory.mktemp("pdf") / "toys.pdf"
    path.write_bytes(printed(*(image for image, *_ in TOY)))
    return path


# -------------------------------------------------------------------------------------------------
# What is drawn


def test_a_scan_of_200_dpi_comes_back_pixel_by_pixel(toys):
    for page, (image, *_) in zip(read_pages(toys), TOY, strict=True):
        assert page.mode == "RGB" and page.size == image.size
        difference = np.abs(np.asarray(page, int) - np.asarray(image.convert("RGB"), int))
        assert difference.mean() < 2        # stored as a JPEG


@pytest.mark.parametrize("turn, size, corner", [
    (0, (1700, 2200), (10, 2190)), (90, (2200, 1700), (10, 10)), (180, (1700, 2200), (1690, 10)),
    (270, (2200, 1700), (2190, 1690))])
def test_a_turned_page_is_upright(turn, size, corner):
    [page] = pages_of(pdf_bytes((LETTER + b"/Rotate %d" % turn, RED)))
    assert page.size == size
    red = [place for place in [(10, 10), (10, size[1] - 10), (size[0] - 10, 10),
                               (size[0] - 10, size[1] - 10)] if page.getpixel(place) == PURE]
    assert red == [corner]


def test_a_cropped_page_is_what_a_viewer_shows():
    [page] = pages_of(pdf_bytes((LETTER + b"/CropBox[0 0 72 36]", RED)))
    assert page.size == (200, 100) and page.getpixel((9, 90)) == PURE


def test_transparency_lies_on_white():
    half = b"<</ExtGState<</G<</ca .5>>>>>>"
    [page] = pages_of(pdf_bytes((LETTER + b"/Resources" + half, b"/G gs " + RED)))
    assert page.getpixel((9, 9)) == WHITE
    assert np.allclose(page.getpixel((9, 2190)), (255, 128, 128), atol=2)


def test_annotations_and_forms_are_drawn():
    """A filled field of a form, and a stamp, each with a red look of its own."""
    look = stream(b"1 0 0 rg 0 0 90 90 re f", b"/Type/XObject/Subtype/Form/BBox[0 0 90 90]")
    field = (b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V(x)/F 4/Rect[0 0 90 90]/P 3 0 R"
             b"/AP<</N 1000 0 R>>>>")
    stamp = b"<</Type/Annot/Subtype/Stamp/F 4/Rect[0 700 90 790]/AP<</N 1000 0 R>>>>"
    data = pdf_bytes((LETTER + b"/Annots[1001 0 R 1002 0 R]", b""),
                     objects={1000: look, 1001: field, 1002: stamp},
                     catalog=b"/AcroForm<</Fields[1001 0 R]>>")
    [page] = pages_of(data)
    assert page.getpixel((100, 100)) == PURE        # the stamp, at the upper left
    red, green, blue = page.getpixel((100, 2100))   # a viewer tints fields
    assert red > 200 and green < 200 and page.getpixel((900, 1100)) == WHITE


@pytest.mark.parametrize("box, size", [
    (b"/MediaBox[0 0 2834645 2834645]", (4608, 4608)),          # a square kilometre
    (b"/MediaBox[0 0 2834645 72]", (4608, 1)),
    (b"/MediaBox[0 0 2384 3370]", (3260, 4608)),                # A0
    (b"/MediaBox[0 0 .01 .01]", (1, 1)),
    (b"/MediaBox[0 0 0 0]", (1700, 2200)),                      # none: then it is a letter
    (b"/MediaBox[72 36 0 0]", (200, 100)),
    (b"", (1700, 2200))], ids=str)
def test_the_size_of_a_page_is_bounded(box, size):
    [page] = pages_of(pdf_bytes((box, RED)))
    assert page.size == size


def test_each_page_has_a_size_of_its_own():
    boxes = [b"/MediaBox[0 0 72 36]", b"/MediaBox[0 0 2384 3370]", b"/MediaBox[0 0 .01 .01]"]
    data = pdf_bytes(*[(box, RED) for box in boxes])
    assert [page.size for page in pages_of(data)] == [(200, 100), (3260, 4608), (1, 1)]
    assert [page.size for page in pages_of(data, "2")] == [(3260, 4608)]


def test_a_pdf_is_known_by_its_content(tmp_path, toys):
    """Not by its name, as other images; it may begin with a greeting."""
    (tmp_path / "a.png").write_bytes(b"\r\nfrom: a printer\r\n" + toys.read_bytes())
    assert len(read_pages(tmp_path / "a.png")) == 3
    TOY[0][0].save(tmp_path / "a.pdf", "PNG")
    assert read_image(tmp_path / "a.pdf").tobytes() == TOY[0][0].convert("RGB").tobytes()


def test_a_password_that_no_reader_asks_for():
    [page] = pages_of(encrypted_pdf(user=b""))
    assert page.getpixel((9, 2190)) == PURE


# -------------------------------------------------------------------------------------------------
# Some pages


@pytest.mark.parametrize("chosen, numbers", [
    (None, [1, 2, 3, 4, 5]), ("2", [2]), ("2-3", [2, 3]), ("5,1-2", [1, 2, 5]),
    ("1-3,2", [1, 2, 3]), (" 4 , 5 ", [4, 5])])
def test_page_numbers(chosen, numbers):
    assert pdf.page_numbers(chosen, 5) == numbers


@pytest.mark.parametrize("chosen", ["0", "6", "3-2", "2-6", "1-999999999", "", "2-", "-2", "a",
                                    "1,,2", "1.5", "²", "9" * 5000])
def test_page_numbers_that_make_no_sense(chosen):
    with pytest.raises(ImageError) as error:
        pdf.page_numbers(chosen, 5)
    says = "pages count from 1, the smaller number first" if chosen in ("0", "3-2") else (
        "(it has 5 pages|say 2, 2-3 or 2,5-7)")
    assert re.fullmatch(f"--pages .{{,60}}: {says}", str(error.value))


@pytest.mark.parametrize("kind", ["PDF", "TIFF"])
def test_some_pages_of_a_pdf_and_of_a_tiff(kind):
    sheets = [Image.new("RGB", (40 + i, 30), "white") for i in range(4)]
    data = printed(*sheets)
    if kind == "TIFF":
        data = encoded(sheets[0], "TIFF", save_all=True, append_images=sheets[1:])
    assert [page.width for page in pages_of(data, "2,4")] == [41, 43]
    with pytest.raises(ImageError, match="image: --pages 5: it has 4 pages"):
        pages_of(data, "5")
    with pytest.raises(ImageError, match="image: --pages 2: it has one page"):
        pages_of(encoded(sheets[0]), "2")
    assert pages_of(encoded(sheets[0]), "1")[0].size == (40, 30)


def test_one_of_thousands_of_pages():
    many = pdf_bytes(*[(LETTER, b"")] * 2000, (LETTER, RED))
    with pytest.raises(ImageError, match="2,001 pages .*at most 1,000 of 400,000,000 .*--pages"):
        pages_of(many)
    with pytest.raises(ImageError, match="1,500 pages .*choose some with --pages"):
        pages_of(many.replace(b"612 792", b"001 001"), "1-1500")
    [page] = pages_of(many, "2001")
    assert page.getpixel((9, 2190)) == PURE


# -------------------------------------------------------------------------------------------------
# What cannot be read


GOOD = pdf_bytes((LETTER, RED))
BAD = {
    "password": (encrypted_pdf(user=b"secret"), "encrypted: save a copy that opens without"),
    "header": (b"%PDF-1.7\n", "not a readable PDF"),
    "cut off": (GOOD[:200], "not a readable PDF"),
    "no pages": (pdf_bytes(), "a PDF without pages"),
    "no page where one is said": (GOOD.replace(b"[3 0 R]", b"[9 0 R]"), "not a readable PDF"),
    "pages in a circle": (GOOD.replace(b"[3 0 R]", b"[2 0 R]"), "not a readable PDF"),
    "cropped away": (pdf_bytes((LETTER + b"/CropBox[1000 1000 2000 2000]", RED)),
                     "a page without an area"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(tmp_path, name):
    data, why = BAD[name]
    (tmp_path / "a.pdf").write_bytes(data)
    with pytest.raises(ImageError) as error:
        read_pages(tmp_path / "a.pdf")
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/a\.pdf: [^\n]*{why}[^\n]*", str(error.value))


def test_a_page_that_takes_for_ever_ends(monkeypatch):
    monkeypatch.setattr(pdf, "SECONDS", 1)
    with pytest.raises(ImageError, match="a page takes more than 1 s to draw"):
        pages_of(nested_forms(7))


def test_a_page_that_fills_the_memory_ends(monkeypatch):
    monkeypatch.setattr(pdf, "MAX_MEMORY", 2 ** 28)
    with pytest.raises(ImageError, match="PDFium breaks down on it, or needs too much memory"):
        pages_of(nested_forms(9))


def test_damaged_files_give_pages_or_an_image_error(toys):
    rng = np.random.default_rng(0)
    good, errors = toys.read_bytes(), 0
    for i in range(20):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 99)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert all(page.mode == "RGB" for page in pages_of(bytes(bad[:len(bad) - 99 * i])))
            except ImageError as error:
                errors += 1
                assert "\n" not in str(error)
    assert errors > 0


def test_without_the_package_its_command_is_said(tmp_path, monkeypatch, toys):
    """An InputError and no ImageError: training stops, it does not drop the sample."""
    (tmp_path / "pypdfium2.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), os.pathsep)
    with pytest.raises(InputError, match="toys.pdf: .* needs `pip install pypdfium2`") as error:
        read_pages(toys)
    assert not isinstance(error.value, ImageError)


# -------------------------------------------------------------------------------------------------
# Wherever an image is taken


def test_sample_reads_a_page_of_a_pdf(tmp_path, toys):
    """The shipped model gives the same answers as about the images; --explain numbers the pages."""
    paths = [PAGE.with_name("browser-4-table.png"), PAGE]
    doc = tmp_path / "doc.pdf"
    doc.write_bytes(printed(*map(read_image, paths)))
    ask = "--max-new-tokens", 16, "--prompt", PROMPT
    said = [sample("--image", path, *ask).stdout for path in paths]
    assert said[1] == ANSWER + "\n" != said[0]
    for number in (1, 2):
        assert sample("--image", doc, "--pages", number, *ask).stdout == said[number - 1]
    together = sample("--image", doc, "--pages", "1-2", *ask).stdout
    assert together == sample("--image", *paths, *ask).stdout
    sample("--image", toys, "--pages", "2-3", "--explain", tmp_path / "tokens.png")
    drawn = sorted(path.name for path in tmp_path.glob("tokens*"))
    assert drawn == ["tokens-1.png", "tokens-2.png"]


def test_sample_says_what_is_wrong(tmp_path, toys):
    said = sample("--image", toys, "--pages", 9, code=2).stderr
    assert said.endswith("toys.pdf: --pages 9: it has 3 pages\n")
    said = sample("--image", toys, "--pages", "", code=2).stderr
    assert said.splitlines()[-1] == "sample.py: error: --pages is empty: say 2, 2-3 or 2,5-7"
    said = sample("--llm", tmp_path, "--prompt", "?", "--pages", 2, code=2).stderr
    assert "--pages needs an --image" in said


def test_folders_and_question_files(tmp_path):
    page = read_image(PAGE)
    (tmp_path / "a.pdf").write_bytes(printed(page, TOY[0][0]))
    page.save(tmp_path / "b.png")
    assert [path.name for path in image_files(tmp_path)] == ["a.pdf", "b.png"]
    ask = "--max-new-tokens", 16
    said = sample("--image", tmp_path, "--pages", 1, *ask, "--prompt", PROMPT).stdout
    assert said == f"a.pdf: {ANSWER}\nb.png: {ANSWER}\n"
    write_lines(tmp_path / "q.jsonl", [{"image": "a.pdf", "prompt": PROMPT}])
    sample("--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl", *ask)
    [row] = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert row["prediction"] + "\n" == sample("--image", tmp_path / "a.pdf", *ask, "--prompt",
                                              PROMPT).stdout


def test_benchmarks(tmp_path, toys):
    """A PDF in base64, and one that is named."""
    with open(tmp_path / "DocVQA.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "image_path", "question", "answer"])
        rows.writerow([0, base64.b64encode(toys.read_bytes()).decode(), "", "?", "!"])
        rows.writerow([1, "", "toys.pdf", "?", "!"])
        rows.writerow([2, base64.b64encode(encrypted_pdf(b"secret")).decode(), "", "?", "!"])
    (tmp_path / "toys.pdf").write_bytes(toys.read_bytes())
    benchmark = open_benchmark(str(tmp_path / "DocVQA.tsv"))
    assert [len(benchmark.images(i)) for i in range(2)] == [3, 3]
    with pytest.raises(InputError, match="DocVQA.tsv, index 2: image: encrypted"):
        benchmark.images(2)


@pytest.fixture
def data_set(tmp_path, toys):
    """Records, a tar and parquet, each with a PDF of three pages and an encrypted one."""
    bad = encrypted_pdf(b"secret")
    (tmp_path / "bad.pdf").write_bytes(bad)
    (tmp_path / "toys.pdf").write_bytes(toys.read_bytes())
    said = messages(("one <image> two", "!"))
    write_lines(tmp_path / "a.jsonl", [{"images": [f"{name}.pdf"], "messages": said}
                                       for name in ("toys", "bad")])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in ("toys", toys.read_bytes()), ("bad", bad):
            add_member(tar, f"{name}.pdf", data)
            add_member(tar, f"{name}.txt", b"!")
    write_parquet(tmp_path / "c.parquet", {"image": [{"bytes": toys.read_bytes()}, {"bytes": bad}],
                                           "query": [["?"]] * 2, "annotations": [["!"]] * 2})
    return tmp_path


@pytest.mark.parametrize("name, parts", [
    ("a.jsonl", ["one ", *[IMAGE] * 3, " two"]), ("b.tar", [IMAGE] * 3),
    ("c.parquet", [*[IMAGE] * 3, "?"])])
def test_training_data(data_set, name, parts):
    """A mark is as many images as its file has pages; a bad PDF is a bad sample of a named kind."""
    documents = Documents([str(data_set / name)], 0, lambda example: example)
    good, bad = [documents[(0, *place)] for place in sorted(one_epoch(documents.sets[0]))]
    assert good.turns[0].parts == parts
    assert [image.size for image in good.images] == [image.size for image, *_ in TOY]
    assert isinstance(bad, Bad) and bad.kind == "unreadable image" and "encrypted" in bad.why


def test_loading_processes(data_set, tokenizer):  # noqa: F811
    """Two of them, forked from one that has read a PDF, bring what it brings itself."""
    documents = documents_of(data_set / "a.jsonl", tokenizer)
    places = [(0, *place) for place in sorted(one_epoch(documents.sets[0]))] * 4
    here = [documents[place] for place in places]
    there = list(DataLoader(documents, batch_size=None, sampler=places, num_workers=2))
    assert [type(item) for item in there] == [Sample, Bad] * 4
    for one, other in zip(here, there):
        if isinstance(one, Sample):
            assert one.pixels.equal(other.pixels) and one.tokens.equal(other.tokens)
