"""The benchmarks of the paper's Table 1, and VCR, as people have them on disk: questions, golds, images and prompts.

    LMUData/DocVQA_VAL.tsv                  VLMEvalKit's TSV: DocVQA, InfoVQA, ChartQA, TextVQA, TableVQABench, VCR
    WTQ=DocDownstream-1.0/test/WikiTableQuestions_test.jsonl        DocDownstream's: DocVQA to ChartQA of Table 1
    VCR-easy=VCR-wiki-en-easy/data          VCR-wiki's parquet files: a folder, of which those of the test split count
    toy, toy-hard=1000, toy-reports         the toy's held-out documents, clean or in another look of toy/looks.py, and
                                            hard pages of four to nine tiles: 200, or as many as one likes

NAME= may be left out where the name of the file, or of a folder above it, tells. A benchmark is read whole or not at
all: a damaged row is an error, since scores over what is left would be those of another benchmark.
"""
import ast
import base64
import binascii
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from plumbing.examples import BadSample
from model import IMAGE
from plumbing.formats import MAX_RECORD, VCR_PROMPT, parquet_example, read_parquet, split_images
from plumbing.settings import InputError
from toy.looks import LOOKS, draw
from toy.pages import KINDS, held_out_documents
from plumbing.images import ImageError, read_image

# In the order of Table 1, each with what its files are called, in lower-case letters and digits.
FILE_NAMES = {"DocVQA": "docvqa", "InfoVQA": "infovqa|infographicsvqa", "DeepForm": "deepform", "KLC": "klc|kleister",
              "WTQ": "wtq|wikitablequestions", "TabFact": "tabfact", "ChartQA": "chartqa", "TextVQA": "textvqa",
              "TableVQABench": "tablevqa", "VCR-easy": "vcr.*easy", "VCR-hard": "vcr.*hard"}
SHORT = "\nAnswer the question using a single word or phrase."      # VLMEvalKit's, word for word
TABLE_VQA_SPLITS = ["fintabnetqa", "vtabfact", "vwtq", "vwtq_syn"]
# The toy's: how their pages look, and of which kinds they are.
TOYS = {**{"toy" if look == "clean" else f"toy-{look}": (look, KINDS) for look in LOOKS},
        "toy-reports": ("hard", ["report"])}
REFERENCE = 64          # characters: an `image` cell that has no more is the index of the row whose image it shares


@dataclass
class Benchmark:
    """Row i: rows[i] is what metrics need of it (index, question, answers, split), prompts[i] what the model is asked.

    images(i) reads and decodes its pages, and raises InputError where they cannot be used.
    """
    name: str
    rows: list[dict]
    prompts: list[str]
    images: Callable[[int], list[Image.Image]]


def open_benchmark(spec: str) -> Benchmark:
    """NAME=PATH, PATH, a name of TOYS, or one=N -> Benchmark, of which no image is read yet. Raises InputError."""
    name, equals, rest = spec.partition("=")
    if name in TOYS:
        return toy_benchmark(name, rest if equals else "200")
    if Path(spec).exists() or not rest:
        name, path = name_of(spec), Path(spec)
    elif name in FILE_NAMES:
        path = Path(rest)
    else:
        raise InputError(f"{spec}: no benchmark is called {name}; there are {', '.join([*FILE_NAMES, *TOYS])}")
    try:
        if path.suffix == ".tsv":
            benchmark = tsv_benchmark(name, path)
        elif path.suffix == ".jsonl":
            benchmark = jsonl_benchmark(name, path)
        elif path.suffix == ".parquet" or path.is_dir():
            benchmark = parquet_benchmark(name, path)
        else:
            raise InputError(f"{path}: neither .tsv nor .jsonl nor .parquet nor a folder of the latter")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if not benchmark.rows:
        raise InputError(f"{path}: not a single question there")
    return benchmark


def name_of(path: str) -> str:
    """The benchmark that a file's name tells, or else that of a folder above it."""
    for part in reversed(Path(path).parts):
        letters = re.sub(r"[^a-z0-9]", "", part.lower())
        for name, pattern in FILE_NAMES.items():
            if re.search(pattern, letters):
                return name
    raise InputError(f"{path}: its name tells no benchmark: say NAME={path}, with one of {', '.join(FILE_NAMES)}, "
                     f"or {', '.join(TOYS)}")


def row_of(index, question: str, answers: list[str], split: str | None = None) -> dict:
    return {"index": index, "question": question, "answers": answers, "split": split}


def read_images(names: list[str], folders: list[Path], root: Path) -> list[Image.Image]:
    """Image files, each in the first of the folders that has it, and none outside of root. Raises ImageError."""
    images = []
    for name in names:
        paths = [Path(os.path.abspath(folder / name)) for folder in folders]
        inside = [path for path in paths if path.is_relative_to(os.path.abspath(root))]
        if not inside:
            raise ImageError(f"{name}: outside of {root}")
        images.append(read_image(next((path for path in inside if path.is_file()), inside[0])))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# VLMEvalKit's TSV


def tsv_records(path: Path, start: int = 0) -> Iterator[tuple[list[str], int]]:
    """The fields of each record from the byte `start` on, and where the next one begins. Raises InputError.

    A field with a tab, a line end or a quote in it is quoted; the images are fields of up to some megabytes.
    """
    csv.field_size_limit(MAX_RECORD)
    with path.open("rb") as file:
        file.seek(start)
        try:
            for record in csv.reader((line.decode() for line in file), delimiter="\t", strict=True):
                yield record, file.tell()
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not UTF-8 text in columns up to byte {file.tell():,} ({error})") from None


def as_list(text: str) -> list[str]:
    """A cell -> its texts: one, or those of a Python list written out. `[Yes, No]` is no such list, but an answer."""
    if text.startswith("[") and text.endswith("]"):
        try:
            return [str(item) for item in ast.literal_eval(text)]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return [text]


def tsv_prompt(name: str, question: str, split: str | None) -> str:
    """What VLMEvalKit asks. TableVQABench's prompts there show examples to models that were not trained for it; these
    say the same in one line: the answer's form."""
    if name in ("DocVQA", "InfoVQA", "ChartQA", "TextVQA") or split == "fintabnetqa":
        return question + SHORT
    if name == "TableVQABench" and split == "vtabfact":
        return f"{question}\nIs this statement true or false? Answer with one of these two words."
    if name == "TableVQABench":
        return question + SHORT + " Several answers are separated by ||."
    return question                 # VCR's files hold the whole prompt


def tsv_benchmark(name: str, path: Path) -> Benchmark:
    """The rows' texts are kept, and where in the file each row with an image begins: the images stay there."""
    records = tsv_records(path)
    header, start = next(records, ([], 0))
    header = [column.removeprefix("\ufeff") for column in header]
    for column in ("index", "question", "answer"):
        if column not in header:
            raise InputError(f"{path}: no column {column} among {', '.join(header)[:200] or 'none'}")
    if "image" not in header and "image_path" not in header:
        raise InputError(f"{path}: neither a column image nor image_path among {', '.join(header)}")
    rows, prompts, starts, shared = [], [], {}, []
    for record, stop in records:
        if len(record) != len(header):
            raise InputError(f"{path}: {len(record)} fields, not {len(header)}, in row {len(rows) + 1}, byte {start:,}")
        row = dict(zip(header, record))
        if row["index"] in starts:
            raise InputError(f"{path}: two rows have the index {row['index']}")
        split = row.get("split", "").removeprefix("test_") or None      # ChartQA's test_human is its human
        if name == "TableVQABench" and split not in TABLE_VQA_SPLITS:
            raise InputError(f"{path}, index {row['index']}: its split is {split}, not {' or '.join(TABLE_VQA_SPLITS)}")
        rows.append(row_of(row["index"], row["question"], as_list(row["answer"]), split))
        prompts.append(tsv_prompt(name, row["question"], split))
        starts[row["index"]], image = start, row.get("image", "")
        shared.append(image if 0 < len(image) <= REFERENCE else row["index"])
        start = stop

    def images(i: int) -> list[Image.Image]:
        if shared[i] not in starts:
            raise InputError(f"{path}, index {rows[i]['index']}: its image is that of index {shared[i]!r}, which is "
                             "not there")
        record, _ = next(tsv_records(path, starts[shared[i]]))
        row = dict(zip(header, record))
        try:
            if len(row.get("image", "")) > REFERENCE:
                return [read_image(io.BytesIO(base64.b64decode(text))) for text in as_list(row["image"])]
            if not row.get("image_path"):
                raise ImageError("no image")
            # below LMUData/images VLMEvalKit puts the images of a TSV that it has made small
            return read_images(as_list(row["image_path"]), [path.parent, path.parent / "images"], path.parent)
        except (ImageError, binascii.Error) as error:
            raise InputError(f"{path}, index {rows[i]['index']}: {error}") from None

    return Benchmark(name, rows, prompts, images)


# ---------------------------------------------------------------------------------------------------------------------
# DocDownstream's JSONL, VCR-wiki's parquet, the toy


def jsonl_benchmark(name: str, path: Path) -> Benchmark:
    """A question and its answer a line; images lie relative to the file, or to the folder above its `test`.

    The model is asked what the file asks, as stage 3 has taught it.
    """
    if name == "TextVQA":
        raise InputError(f"{path}: TextVQA's accuracy needs the answers of ten people, DocDownstream has one of them: "
                         "take VLMEvalKit's TextVQA_VAL.tsv")
    rows, files = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row, names = jsonl_row(line, len(rows), f"{path}, line {number}")
                rows.append(row)
                files.append((number, names))

    def images(i: int) -> list[Image.Image]:
        number, names = files[i]
        try:
            return read_images(names, [path.parent, path.parent.parent], path.parent.parent)
        except ImageError as error:
            raise InputError(f"{path}, line {number}: {error}") from None

    return Benchmark(name, rows, [row["question"] for row in rows], images)


def jsonl_row(line: bytes, index: int, where: str) -> tuple[dict, list[str]]:
    """A record of DocDownstream -> its row, and the names of its images. Raises InputError."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        (asks, question), (answers, gold) = [(turn["role"], turn["content"]) for turn in record["messages"]]
        question = "".join(part for part in split_images(question) if part != IMAGE)
        names = record["image"]
        if (asks, answers) != ("user", "assistant") or not names or not isinstance(names, list) or not all(
                isinstance(text, str) for text in [gold, *names]):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{where}: not JSON with a list image and two messages, a user's question and an assistant's "
                         "answer") from None
    return row_of(index, question, [gold]), names


def parquet_benchmark(name: str, path: Path) -> Benchmark:
    """VCR-wiki: stacked_image is shown, crossed_text are the texts of its blanks."""
    files = sorted(path.rglob("test*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no test*.parquet there")
    rows, places = [], []
    for file in files:
        try:
            blanks = read_parquet(file).read(columns=["crossed_text"]).column("crossed_text").to_pylist()
        except InputError:
            raise
        except Exception as error:      # a damaged file shows itself in many ways
            raise InputError(f"{file}: not VCR-wiki's parquet ({' '.join(str(error).split())})") from None
        for row, texts in enumerate(blanks):
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{file}, row {row}: crossed_text is no list of texts")
            rows.append(row_of(len(rows), VCR_PROMPT, texts))
            places.append((file, row))

    def images(i: int) -> list[Image.Image]:
        file, row = places[i]
        try:
            return parquet_example(file, row, f"{file}:{row}").images
        except (BadSample, ImageError) as error:
            raise InputError(f"{file}, row {row}: {': '.join(map(str, error.args))}") from None

    return Benchmark(name, rows, [VCR_PROMPT] * len(rows), images)


def toy_benchmark(name: str, number: str) -> Benchmark:
    """The held-out documents that train.py reads at its end with --seed 0, with one question each."""
    if not number.isascii() or not number.isdigit() or not 0 < int(number[:9]) <= 1_000_000:
        raise InputError(f"{name}={number}: {name}=N takes a number of documents, at most 1,000,000")
    look, kinds = TOYS[name]
    documents = held_out_documents(int(number), seed=0, kinds=kinds)
    rows = [row_of(i, prompt, [gold], page.kind) for i, (page, prompt, gold) in enumerate(documents)]
    return Benchmark(name, rows, [prompt for _, prompt, _ in documents],
                     lambda i: [draw(documents[i][0], look)])
