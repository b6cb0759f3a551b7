"""The benchmarks of the paper's Table 1, and VCR, as people have them on disk.

    LMUData/DocVQA_VAL.tsv          VLMEvalKit's TSV: DocVQA, InfoVQA, ChartQA, TextVQA,
                                    TableVQABench, VCR
    WTQ=DocDownstream-1.0/test/WikiTableQuestions_test.jsonl        DocDownstream's: DocVQA to
                                    ChartQA of Table 1
    VCR-easy=VCR-wiki-en-easy/data  VCR-wiki's parquet files: a folder, of which those of the test
                                    split count
    reader-pages, reader-a4, reader-scans, reader-hard, reader-drawn
                                    pages of print, each read aloud, and asked about if it has a
                                    question: 25 that other programs set (reader/printed), whole A4
                                    pages of small type by such programs, cuttings of old print that
                                    was scanned, pages photographed, turned, small or in Greek and
                                    Cyrillic type, and 200 held-out pages that were drawn
    toy, toy=1000                   the toy's held-out documents, 200 or as many as one likes

NAME= may be left out where the name of the file, or of a folder above it, tells. A benchmark is
read whole or not at all: a damaged row is an error, since scores over what is left would be those
of another benchmark.
"""
import ast
import base64
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data import READ
from plumbing.examples import IMAGE, BadSample
from plumbing.folders import is_foreign, is_inside
from plumbing.formats import (MAX_RECORD, VCR_PROMPT, parquet_example, read_parquet,
                              record_images, split_images)
from plumbing.images import read_pages
from plumbing.settings import ImageError, InputError
from plumbing.tokenizers import TextError, check_surrogates
from toy.pages import draw, held_out_documents

# In the order of Table 1, each with what its files are called, in lower-case letters and digits.
FILE_NAMES = {
    "DocVQA": "(?<!mp)(?<!slide)docvqa",        # those are other benchmarks
    "InfoVQA": "infovqa|infographicsvqa",
    "DeepForm": "deepform",
    "KLC": "klc|kleister",
    "WTQ": "^(?!vwtq|.*tablevqa).*wtq|wikitablequestions",      # vwtq: a split of TableVQABench
    "TabFact": "tabfact",
    "ChartQA": "chartqa(?!pro(test|val|tsv|jsonl|$))",
    "TextVQA": "textvqa",
    "TableVQABench": "tablevqa",
    "VCR-easy": "vcr.*easy",
    "VCR-hard": "vcr.*hard",
}
SHORT = "\nAnswer the question using a single word or phrase."      # VLMEvalKit's, word for word
TABLE_VQA_SPLITS = ["fintabnetqa", "vtabfact", "vwtq", "vwtq_syn"]
# The reader's: folders of pages with a questions.jsonl.
READER = Path(__file__).resolve().parents[1] / "reader"
READERS = {"reader-pages": READER / "printed", "reader-a4": READER / "a4",
           "reader-scans": READER / "scans", "reader-hard": READER / "hard",
           "reader-drawn": READER / "held-out"}
OURS = ["toy", *READERS]
# An `image` cell that has no more characters is the index of the row whose image it shares.
REFERENCE = 64
# Said by a row whose file is scored by DUE (paper/metrics.py).
DUE = "DUE"
# DUE's names of what DocDownstream has of it; DocOwl's evaluation reads DocVQA and InfoVQA so too.
DUE_FOLDERS = {"DocVQA": "DocVQA", "InfoVQA": "InfographicsVQA", "DeepForm": "DeepForm",
               "KLC": "KleisterCharity", "WTQ": "WikiTableQuestions"}


@dataclass
class Benchmark:
    """Row i: rows[i] is what metrics need of it, prompts[i] what the model is asked.

    A row has index, question, answers and split. images(i) reads and decodes its pages, and raises
    InputError where they cannot be used. path: the file or folder that was opened, if any was.
    """
    name: str
    rows: list[dict]
    prompts: list[str]
    images: Callable[[int], list[Image.Image]]
    path: Path | None = None


def open_benchmark(spec: str) -> Benchmark:
    """NAME=PATH, PATH, toy, toy=N, or one of READERS -> Benchmark, of which no image is read yet.

    Raises InputError.
    """
    name, equals, rest = spec.partition("=")
    if name == "toy":
        return toy_benchmark(rest if equals else "200")
    if spec in READERS:
        return reader_benchmark(spec, READERS[spec])
    if name in READERS:
        raise InputError(f"{spec}: {name} stands alone; for fewer samples add --limit")
    if Path(spec).exists() or not rest:
        name, path = name_of(spec), Path(spec)
    elif name in FILE_NAMES:
        path = Path(rest)
    else:
        known = ", ".join([*FILE_NAMES, *OURS])
        raise InputError(f"{spec}: no benchmark is called {name}; there are {known}")
    try:
        suffix = path.suffix.lower()
        if suffix == ".tsv":
            benchmark = tsv_benchmark(name, path)
        elif suffix == ".jsonl":
            benchmark = jsonl_benchmark(name, path)
        elif suffix == ".parquet" or path.is_dir():
            benchmark = parquet_benchmark(name, path)
        else:
            raise InputError(f"{path}: neither .tsv nor .jsonl nor .parquet nor a folder of the "
                             "latter")
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from None
    if not benchmark.rows:
        raise InputError(f"{path}: not a single question there")
    benchmark.path = path
    return benchmark


def name_of(path: str) -> str:
    """The benchmark that a file's name tells, or else that of a folder above it."""
    for part in reversed(Path(path).parts):
        letters = re.sub(r"[^a-z0-9]", "", part.lower())
        if re.search("vcr.*zh", letters):
            raise InputError(f"{path}: VCR in Chinese is not scored: its words are not marked by "
                             "spaces")
        for name, pattern in FILE_NAMES.items():
            if re.search(pattern, letters):
                return name
    raise InputError(f"{path}: its name tells no benchmark: say NAME={path}, with one of "
                     f"{', '.join(FILE_NAMES)}, or {', '.join(OURS)}")


def row_of(index, question: str, answers: list[str], split: str | None = None) -> dict:
    return {"index": index, "question": question, "answers": answers, "split": split}


def read_images(names: list[str], folders: list[Path], root: Path) -> list[Image.Image]:
    """The pages of image files, each in the first of the folders that has it, and none outside of
    root.

    Raises ImageError.
    """
    images = []
    root = Path(os.path.abspath(root))
    for name in names:
        paths = [Path(os.path.abspath(folder / name)) for folder in folders]
        inside = [path for path in paths if is_inside(path, root)]
        if paths[0] not in inside:
            raise ImageError(f"{name}: outside of {root}")
        there = [path for path in inside if os.path.isfile(path)]
        images += read_pages((there or inside)[0])
    return images


# -------------------------------------------------------------------------------------------------
# VLMEvalKit's TSV


def tsv_benchmark(name: str, path: Path) -> Benchmark:
    """The rows' texts are kept, and where in the file a row's image stands: it stays there."""
    records = tsv_records(path)
    header, start = next(records, ([], 0))
    header = [column.removeprefix("\ufeff") for column in header]
    check_header(header, path)
    rows, prompts = [], []
    starts = {}             # by index: the byte at which the row begins
    image_of = {}           # by index: the index of the row that has its image, or points on
    for record, stop in records:
        if len(record) != len(header):
            raise InputError(f"{path}: {len(record)} fields, not {len(header)}, in row "
                             f"{len(rows) + 1}, byte {start:,}")
        cells = dict(zip(header, record))
        index = cells["index"]
        if index in starts:
            raise InputError(f"{path}: two rows have the index {index}")
        split = cells.get("split", "").removeprefix("test_") or None    # ChartQA's test_human
        if name == "TableVQABench" and split not in TABLE_VQA_SPLITS:
            raise InputError(f"{path}, index {index}: its split is {split}, not "
                             f"{' or '.join(TABLE_VQA_SPLITS)}")
        # VLMEvalKit takes TableVQABench's cells as they are.
        answer = cells["answer"]
        golds = [answer] if name == "TableVQABench" else as_list(answer)
        if not golds:
            raise InputError(f"{path}, index {index}: its answer is an empty list")
        rows.append(row_of(index, cells["question"], golds, split))
        prompts.append(tsv_prompt(name, cells["question"], split))
        image = cells.get("image", "")
        image_of[index] = image if 0 < len(image) <= REFERENCE else index
        starts[index] = start
        start = stop

    def images(i: int) -> list[Image.Image]:
        where = f"{path}, index {rows[i]['index']}"
        index = image_row(image_of, rows[i]["index"], where)
        record, _ = next(tsv_records(path, starts[index]))
        try:
            return tsv_images(dict(zip(header, record)), path)
        except ValueError as error:     # ImageError, and base64's
            raise InputError(f"{where}: {error}") from None

    return Benchmark(name, rows, prompts, images)


def image_row(image_of: dict[str, str], index: str, where: str) -> str:
    """The index of the row that has the image of row `index`, from one row to another.

    Raises InputError.
    """
    passed = [index]
    while image_of[passed[-1]] != passed[-1]:
        target = image_of[passed[-1]]
        if target not in image_of:
            raise InputError(f"{where}: its image is that of index {target!r}, which is not there")
        if target in passed:
            raise InputError(f"{where}: its image is that of index {target!r}, which points back")
        passed.append(target)
    return passed[-1]


def tsv_records(path: Path, start: int = 0) -> Iterator[tuple[list[str], int]]:
    """The fields of each record from the byte `start` on, and where the next one begins.

    A field with a tab, a line end or a quote in it is quoted; the images are fields of up to some
    megabytes. Blank lines are passed over. Raises InputError.
    """
    csv.field_size_limit(MAX_RECORD)
    with path.open("rb") as file:
        file.seek(start)
        try:
            lines = (line.decode() for line in file)
            for record in csv.reader(lines, delimiter="\t", strict=True):
                if record:
                    yield record, file.tell()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text up to byte {file.tell():,} ({error})"
                             ) from None
        except csv.Error as error:
            hint = ': a cell with a quote in it is quoted, as """so"" it is"'
            raise InputError(f"{path}: no columns in the row that ends at byte {file.tell():,} "
                             f"({error}){hint if 'expected after' in str(error) else ''}"
                             ) from None


def check_header(header: list[str], path: Path) -> None:
    """Raises InputError where a column is missing, or one is there twice."""
    columns = ", ".join(header)[:200] or "none"
    for column in header:
        if column and header.count(column) > 1:
            raise InputError(f"{path}: two columns {column} among {columns}")
    for column in ("index", "question", "answer"):
        if column not in header:
            raise InputError(f"{path}: no column {column} among {columns}")
    if "image" not in header and "image_path" not in header:
        raise InputError(f"{path}: neither a column image nor image_path among {columns}")


def tsv_images(cells: dict[str, str], path: Path) -> list[Image.Image]:
    """The images of a row, in base64 or as names of files below the TSV's folder.

    VLMEvalKit keeps DATASET.tsv's images in LMUData/images/DATASET. Raises ImageError, and
    ValueError for what is no base64.
    """
    folder = path.parent
    image = cells.get("image", "")
    if len(image) > REFERENCE:
        texts = [text.partition(",")[2] if text.startswith("data:") else text
                 for text in as_list(image)]            # data:image/png;base64,
        files = [io.BytesIO(base64.b64decode(text)) for text in texts]
        pages = [page for file in files for page in read_pages(file)]
    else:
        images, cell = folder / "images", cells.get("image_path")
        names = as_list(cell) if cell else []
        pages = read_images(names, [folder, images / path.stem, images], folder)
    if not pages:
        raise ImageError("no image")
    return pages


def as_list(text: str) -> list[str]:
    """A cell -> its texts: one, or those of a Python list written out.

    `[Yes, No]` is no such list, but an answer.
    """
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            return [str(item) for item in ast.literal_eval(stripped)]
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return [text]


def tsv_prompt(name: str, question: str, split: str | None) -> str:
    """What VLMEvalKit asks.

    Its prompts for TableVQABench show examples to models that were not trained for it; these say
    the same in one line: the answer's form. VCR's files hold the whole prompt.
    """
    if name in ("DocVQA", "InfoVQA", "ChartQA", "TextVQA") or split == "fintabnetqa":
        return question + SHORT
    if name == "TableVQABench" and split == "vtabfact":
        return (f"{question}\nIs this statement true or false? Answer with one of these two "
                "words.")
    if name == "TableVQABench":
        return question + SHORT + " Several answers are separated by ||."
    return question


# -------------------------------------------------------------------------------------------------
# DocDownstream's JSONL


def jsonl_benchmark(name: str, path: Path) -> Benchmark:
    """A question and its answer a line; images lie relative to the file, or the folder above.

    The model is asked what the file asks, as stage 3 has taught it. The golds are those of DUE's
    document.jsonl if it lies in DocDownstream's folder meta, else the answer.
    """
    if name == "TextVQA":
        raise InputError(f"{path}: TextVQA's accuracy needs the answers of ten people, "
                         "DocDownstream has one of them: take VLMEvalKit's TextVQA_VAL.tsv")
    rows, files = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                question, gold, names = read_record(line, where)
                row = {**row_of(len(rows), question, [gold]), "document": names[0]}
                rows.append({**row, "evaluation": DUE} if name in DUE_FOLDERS else row)
                files.append((where, names))
    above = Path(os.path.abspath(path)).parent.parent
    if name in DUE_FOLDERS:
        meta = above / "meta" / DUE_FOLDERS[name] / "test"
        if (meta / "document.jsonl").exists():
            take_variants(rows, meta, every_value=name == "WTQ")

    def images(i: int) -> list[Image.Image]:
        where, names = files[i]
        try:
            return read_images(names, [path.parent, above], above)
        except ImageError as error:
            raise InputError(f"{where}: {error}") from None

    return Benchmark(name, rows, [row["question"] for row in rows], images)


def take_variants(rows: list[dict], meta: Path, every_value: bool) -> None:
    """Put DUE's document names and golds into the rows. Raises InputError.

    metadata.jsonl has a line for each row: its document, and the question as DUE has it, in which
    DeepForm's and KLC's key stands. document.jsonl has a line for each document: its keys, each
    with values, and these with value_variants. The golds are all spellings of the values, and
    "values" says how many these are; with every_value (WTQ) the golds are one spelling of each. A
    row whose key the document lacks keeps its own.
    """
    values = document_values(meta / "document.jsonl")
    records = read_json_lines(meta / "metadata.jsonl")
    if len(records) != len(rows):
        raise InputError(f"{meta / 'metadata.jsonl'}: {len(records):,} lines for {len(rows):,} "
                         "questions: it belongs to another file, take it away or take that one")
    for number, (row, record) in enumerate(zip(rows, records), 1):
        try:
            name = record["file_name"].split("/")[-1].split(".pdf")[0]
            question = json.loads(record["ground_truth"])["gt_parses"][0]["question"]
            if not isinstance(question, str):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{meta / 'metadata.jsonl'}, line {number}: no file_name and "
                             "ground_truth as DocDownstream has them") from None
        row["document"] = name
        found = values.get(name, {})
        keys = [key for key in found if key in question]
        if not keys:
            continue
        spellings = found[max(keys, key=len)]       # the whole question, if it is a key
        row["answers"] = [of_value[0] for of_value in spellings]
        if not every_value:
            row["answers"] = [text for of_value in spellings for text in of_value]
            row["values"] = len(spellings)


def document_values(path: Path) -> dict[str, dict[str, list[list[str]]]]:
    """document.jsonl -> by document and key the values, each a list of its spellings.

    Raises InputError.
    """
    documents: dict[str, dict[str, list[list[str]]]] = {}
    for number, record in enumerate(read_json_lines(path), 1):
        try:
            of_document = documents.setdefault(record["name"], {})
            for annotation in record["annotations"]:
                key = annotation["key"]
                spellings = [[value["value"], *(value.get("value_variants") or [])]
                             for value in annotation["values"]]
                if spellings:
                    of_document.setdefault(key, []).extend(spellings)
                texts = [key, *(text for of_value in spellings for text in of_value)]
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number}: no name and annotations with values as DUE "
                             "has them") from None
    return documents


def read_json_lines(path: Path) -> list:
    """The values in a JSONL file. Raises InputError."""
    values = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    values.append(json.loads(line))
            except (ValueError, RecursionError):
                raise InputError(f"{path}, line {number}: not JSON") from None
    return values


def read_record(line: bytes, where: str) -> tuple[str, str, list[str]]:
    """A record of DocDownstream -> question, answer, names of its images. Raises InputError."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        asked, answered = record["messages"]
        roles = asked["role"], answered["role"]
        question = "".join(part for part in split_images(asked["content"]) if part != IMAGE)
        gold = answered["content"]
        names = record_images(record)
        if roles != ("user", "assistant") or not names:
            raise ValueError
        if not all(isinstance(text, str) for text in [gold, *names]):
            raise ValueError
        check_surrogates(question)
    except TextError as error:
        raise InputError(f"{where}: {error}") from None
    except BadSample as error:
        raise InputError(f"{where}: {': '.join(map(str, error.args))}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{where}: not JSON with image or images and two messages, a user's "
                         "question and an assistant's answer") from None
    return question, gold, names


# -------------------------------------------------------------------------------------------------
# VCR-wiki's parquet


def parquet_benchmark(name: str, path: Path) -> Benchmark:
    """VCR-wiki: stacked_image is shown, crossed_text are the texts of its blanks."""
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("test*.parquet"))
                 if not is_foreign(file.relative_to(path))]
    if not files:
        raise InputError(f"{path}: no test*.parquet there")
    rows, places = [], []
    for file in files:
        for i, blanks in enumerate(read_blanks(file)):
            rows.append(row_of(len(rows), VCR_PROMPT, blanks))
            places.append((file, i))

    def images(i: int) -> list[Image.Image]:
        file, row = places[i]
        try:
            return parquet_example(file, row, f"{file}:{row}").images
        except (BadSample, ImageError) as error:
            reasons = ": ".join(map(str, error.args))
            raise InputError(f"{file}, row {row}: {reasons}") from None

    return Benchmark(name, rows, [VCR_PROMPT] * len(rows), images)


def read_blanks(file: Path) -> list[list[str]]:
    """The texts of each row's blanks. Raises InputError."""
    try:
        table = read_parquet(file).read(columns=["crossed_text"])
        rows = table.column("crossed_text").to_pylist()
    except InputError:
        raise
    except Exception as error:      # a damaged file shows itself in many ways
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not VCR-wiki's parquet ({reason})") from None
    for i, texts in enumerate(rows):
        is_list = isinstance(texts, list) and bool(texts)
        if not is_list or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{file}, row {i}: crossed_text is no list of texts")
    return rows


# -------------------------------------------------------------------------------------------------
# The toy


def toy_benchmark(number: str) -> Benchmark:
    """The held-out documents that train.py reads at its end, seed 0, with one question each."""
    if not number.isascii() or not number.isdigit() or not 0 < int(number[:9]) <= 1_000_000:
        raise InputError(f"toy={number}: toy=N takes a number of documents, at most 1,000,000")
    documents = held_out_documents(int(number), seed=0)
    rows = [row_of(i, prompt, [gold], page.kind)
            for i, (page, prompt, gold) in enumerate(documents)]

    def images(i: int) -> list[Image.Image]:
        page, _, _ = documents[i]
        return [draw(page)]

    return Benchmark("toy", rows, [row["question"] for row in rows], images)


# -------------------------------------------------------------------------------------------------
# The reader


def reader_benchmark(name: str, folder: Path) -> Benchmark:
    """The pages of a folder, each read aloud, and then asked about if it has a question."""
    rows, files = [], []
    for page in folder_pages(folder):
        asks = [(READ, page["text"])]
        if page["prompt"] != READ:
            asks.append((page["prompt"], page["answer"]))
        for prompt, gold in asks:
            rows.append(row_of(len(rows), prompt, [gold], page["kind"]))
            files.append(folder / page["image"])

    def images(i: int) -> list[Image.Image]:
        try:
            return read_pages(files[i])
        except ImageError as error:
            raise InputError(str(error)) from None

    return Benchmark(name, rows, [row["question"] for row in rows], images)


def folder_pages(folder: Path) -> list[dict]:
    """The lines of a folder's questions.jsonl: image, kind, text, prompt and answer of each.
    Raises InputError."""
    path = folder / "questions.jsonl"
    keys = {"image", "kind", "text", "prompt", "answer"}
    try:
        pages = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON, line by line ({error})") from None
    for number, page in enumerate(pages, 1):
        if not isinstance(page, dict) or not keys <= page.keys():
            raise InputError(f"{path}, line {number}: {', '.join(sorted(keys))} are needed")
    return pages
