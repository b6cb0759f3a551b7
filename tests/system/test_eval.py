"""Evaluation: benchmarks as they are released, odd and damaged files, and predictions.

Nothing changes the predictions: not batches, ranks, interruptions.
"""
import base64
import csv
import io
import json
import math
import os
import random
import shutil
import sys
import tracemalloc
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from PIL import Image

import eval as evaluation
from conftest import ROOT, randomise, run, torchrun
from data import Tokenizer, encode_chat
from model import ALIGNVLM_PRESETS, AlignVLM
from paper.benchmarks import READERS, SHORT, as_list, name_of, open_benchmark
from paper.noise import feature_std, noise_on, summary
from paper.predictions import read_predictions
from paper.tables import COLUMNS, TABLE_1, benchmark_file, noise_table, score_tables
from plumbing import files
from plumbing.examples import IMAGE, Turn
from plumbing.formats import VCR_PROMPT
from plumbing.settings import InputError
from shipped import CHECKPOINT
from toy.pages import draw, held_out_documents, write_toy_tokenizer
from vision import tile


def picture(i, size=(60, 40)):
    """An image that is not like any other, and its PNG: noise, so that its base64 is long."""
    image = Image.frombytes("RGB", size, random.Random(i).randbytes(3 * size[0] * size[1]))
    data = io.BytesIO()
    image.save(data, "png")
    return image, data.getvalue()


def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


def base64_of(i):
    return base64.b64encode(picture(i)[1]).decode()


def write_tsv(path, header, rows):
    """As pandas does: quotes only around what needs them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([header, *rows])
    return path


HEADER = ["index", "image", "question", "answer"]
DOCVQA = [["0", base64_of(0), "what is it?", "['a', \"b's\"]"],
          ["7", "0", 'a question\twith "quotes"\nand two lines', "[Yes, No]"],
          ["3", base64_of(3), "wie heißt er?", "1.50"],
          ["12", "3", "who?", "[]x"]]


@pytest.fixture
def docvqa(tmp_path):
    return write_tsv(tmp_path / "DocVQA_VAL.tsv", HEADER, DOCVQA)


def refused(says, names, do, *args):
    """The one line with which an input is refused: it says what is wrong and names the file."""
    with pytest.raises(InputError, match=says) as error:
        do(*args)
    assert names in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# Readers


def test_a_tsv_is_read_as_it_was_written(docvqa):
    benchmark = open_benchmark(str(docvqa))
    assert benchmark.name == "DocVQA"
    assert benchmark.rows == [
        {"index": "0", "question": "what is it?", "answers": ["a", "b's"], "split": None},
        {"index": "7", "question": DOCVQA[1][2], "answers": ["[Yes, No]"], "split": None},
        {"index": "3", "question": "wie heißt er?", "answers": ["1.50"], "split": None},
        {"index": "12", "question": "who?", "answers": ["[]x"], "split": None}]
    assert benchmark.prompts == [row["question"] + SHORT for row in benchmark.rows]
    for i, shown in enumerate([0, 0, 3, 3]):
        [image] = benchmark.images(i)
        assert same(image, picture(shown)[0])


def test_the_images_of_a_tsv_stay_on_disk(tmp_path):
    """20 MB of images: what is held of them is far less."""
    cell = base64.b64encode(random.Random(0).randbytes(750_000)).decode()
    path = write_tsv(tmp_path / "InfoVQA_VAL.tsv", HEADER,
                     [[str(i), cell, "q", "a"] for i in range(20)])
    tracemalloc.start()
    try:
        benchmark = open_benchmark(str(path))
        held, _ = tracemalloc.get_traced_memory()
        assert len(benchmark.rows) == 20 and held < 200_000
    finally:
        tracemalloc.stop()


def test_tsv_columns_in_any_order_paths_splits_and_line_ends(tmp_path):
    """image_path as VLMEvalKit makes it of large files, absolute or below LMUData/images.

    Windows' line ends; a BOM.
    """
    folder = tmp_path / "images" / "ChartQA"
    folder.mkdir(parents=True)
    for i in (1, 2):
        (folder / f"{i}.png").write_bytes(picture(i)[1])
    path = tmp_path / "ChartQA_TEST.tsv"
    rows = [("split", "question", "answer", "index", "image_path"),
            ("test_human", "a?", "14", "5", "ChartQA/1.png"),
            ("test_augmented", "b?", "Yes", "6", str(folder / "2.png")),
            ("", "c?", "[1, 2]", "8", "['ChartQA/1.png', 'ChartQA/2.png']")]
    text = "".join("\t".join(row) + "\r\n" for row in rows)
    path.write_bytes(f"\ufeff{text}".encode())
    benchmark = open_benchmark(str(path))
    assert [row["split"] for row in benchmark.rows] == ["human", "augmented", None]
    assert [row["index"] for row in benchmark.rows] == ["5", "6", "8"]
    assert benchmark.rows[2]["answers"] == ["1", "2"]
    one, two, both = [benchmark.images(i) for i in range(3)]
    assert [len(images) for images in (one, two, both)] == [1, 1, 2]
    assert same(one[0], picture(1)[0]) and same(two[0], picture(2)[0])
    assert same(both[1], picture(2)[0])


@pytest.mark.parametrize("text, answers", [
    ("a", ["a"]), ("", [""]), ("['a']", ["a"]), ("[3, 4.5, 'x']", ["3", "4.5", "x"]),
    (" ['a', 'b']\n", ["a", "b"]),
    ("[Yes, No]", ["[Yes, No]"]),
    ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]),
    ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000])])
def test_answers_are_read_and_never_run(text, answers):
    assert as_list(text) == answers


@pytest.mark.parametrize("name, asks", [
    ("DocVQA_VAL", SHORT), ("InfoVQA_VAL", SHORT), ("ChartQA_TEST", SHORT), ("TextVQA_VAL", SHORT),
    ("VCR_EN_EASY_ALL", "")])
def test_a_tsvs_question_is_asked_as_vlmevalkit_asks_it(tmp_path, name, asks):
    tsv = write_tsv(tmp_path / f"{name}.tsv", HEADER, DOCVQA[:1])
    assert open_benchmark(str(tsv)).prompts == [f"what is it?{asks}"]


@pytest.mark.parametrize("split, tail", [
    ("fintabnetqa", SHORT),
    ("vwtq", SHORT + " Several answers are separated by ||."),
    ("vtabfact", "\nIs this statement true or false? Answer with one of these two words.")])
def test_table_vqa_asks_for_each_splits_form_of_answer(tmp_path, split, tail):
    path = write_tsv(tmp_path / "tablevqa-bench.tsv", [*HEADER, "split"],
                     [["0", base64_of(0), "q", "a", split]])
    benchmark = open_benchmark(str(path))
    assert benchmark.name == "TableVQABench" and benchmark.rows[0]["split"] == split
    assert benchmark.prompts == ["q" + tail]


def write_doc_downstream(root, name, asked, image="./imgs/DUE_Benchmark/DocVQA/pngs/{i}.png"):
    """DocDownstream-1.0 as it is unpacked: imgs/ and test/NAME_test.jsonl."""
    path = root / "test" / f"{name}_test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, (question, gold) in enumerate(asked):
            png = root / image.format(i=i)
            png.parent.mkdir(parents=True, exist_ok=True)
            png.write_bytes(picture(i)[1])
            turns = [{"role": "user", "content": f"<|image|>{question}"},
                     {"role": "assistant", "content": gold}]
            record = {"image": [image.format(i=i)], "messages": turns, "task_name": "qa_sft",
                      "dataset_name": name}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


@pytest.mark.parametrize("file, name", [
    ("DocVQA", "DocVQA"), ("InfographicsVQA", "InfoVQA"), ("DeepForm", "DeepForm"),
    ("KleisterCharity", "KLC"), ("WikiTableQuestions", "WTQ"), ("TabFact", "TabFact"),
    ("ChartQA", "ChartQA")])
def test_doc_downstreams_test_files(tmp_path, file, name):
    asked = [("what is «it»?", "1/8/93"), ("empty?", ""), ("two\u2028lines?", "None")]
    benchmark = open_benchmark(str(write_doc_downstream(tmp_path, file, asked)))
    assert benchmark.name == name
    kept = "index", "question", "answers", "split"
    assert [{key: row[key] for key in kept} for row in benchmark.rows] == [
        {"index": i, "question": question, "answers": [gold], "split": None}
        for i, (question, gold) in enumerate(asked)]
    assert [row["document"].split("/")[-1] for row in benchmark.rows] == ["0.png", "1.png", "2.png"]
    by_due = name not in ("TabFact", "ChartQA")
    assert all((row.get("evaluation") == "DUE") == by_due for row in benchmark.rows)
    assert benchmark.prompts == [question for question, _ in asked]
    for i in range(3):
        [image] = benchmark.images(i)
        assert same(image, picture(i)[0])


def write_meta(root, folder, asked, documents):
    """DocDownstream's meta/FOLDER/test: a line for each question, and DUE's golds by document.

    asked: (document, question); documents: {document: {key: [[value, variant, ...], ...]}}.
    """
    meta = root / "meta" / folder / "test"
    meta.mkdir(parents=True)
    with (meta / "metadata.jsonl").open("w") as file:
        for document, question in asked:
            truth = {"gt_parses": [{"question": question, "answer": "x"}]}
            record = {"file_name": f"x/{document}.pdf_0.png", "ground_truth": json.dumps(truth)}
            file.write(json.dumps(record) + "\n")
    with (meta / "document.jsonl").open("w") as file:
        for name, keys in documents.items():
            annotations = [
                {"key": key, "values": [{"value": value, "value_variants": [value, *others]}
                                        for value, *others in values]}
                for key, values in keys.items()]
            file.write(json.dumps({"name": name, "annotations": annotations}) + "\n")
    return meta


@pytest.mark.parametrize("file, folder, golds", [
    ("DocVQA", "DocVQA", [["1 Jan", "1 Jan", "January 1"], ["kept"], ["b", "b", "c", "c", "C"]]),
    ("KleisterCharity", "KleisterCharity",
     [["1 Jan", "1 Jan", "January 1"], ["kept"], ["b", "b", "c", "c", "C"]]),
    ("WikiTableQuestions", "WikiTableQuestions", [["1 Jan"], ["kept"], ["b", "c"]])])
def test_dues_golds_are_taken_where_they_lie_beside(tmp_path, file, folder, golds, monkeypatch):
    """All spellings of a value, of WTQ's one each. A question without a key keeps its own."""
    path = write_doc_downstream(tmp_path, file, [("the date ?", "one"), ("who?", "kept"),
                                                 ("the dates?", "three")])
    asked = [("a1", "the date"), ("a1", "who"), ("b2", "the dates")]
    documents = {"a1": {"the date": [["1 Jan", "January 1"]], "date": [["wrong"]]},
                 "b2": {"the dates": [["b"], ["c", "C"]], "who": [["other document"]]}}
    meta = write_meta(tmp_path, folder, asked, documents)
    rows = open_benchmark(str(path)).rows
    assert [row["answers"] for row in rows] == golds
    assert [row["document"] for row in rows] == ["a1", "a1", "b2"]
    monkeypatch.chdir(path.parent)              # named without its folder
    there = open_benchmark(path.name)
    assert [row["answers"] for row in there.rows] == golds
    assert same(there.images(0)[0], picture(0)[0])
    (meta / "metadata.jsonl").write_text("")
    refused("0 lines for 3", "metadata.jsonl", open_benchmark, str(path))
    for bad in ('{"name": "a1"}', json.dumps({"name": "a1", "annotations": [
            {"key": 7, "values": [{"value": "b"}]}]})):
        (meta / "document.jsonl").write_text(bad)
        refused("line 1: no name and annotations", "document.jsonl", open_benchmark, str(path))
    (meta / "document.jsonl").write_text("")
    truth = json.dumps({"gt_parses": [{"question": None}]})
    record = json.dumps({"file_name": "x.pdf_0.png", "ground_truth": truth})
    (meta / "metadata.jsonl").write_text(3 * (record + "\n"))
    refused("line 1: no file_name and", "metadata.jsonl", open_benchmark, str(path))
    (meta / "metadata.jsonl").unlink()
    refused("No such file", "metadata.jsonl", open_benchmark, str(path))


def test_odd_cells_of_a_tsv_are_texts_or_one_line(tmp_path):
    path = write_tsv(tmp_path / "DocVQA_VAL.tsv", HEADER,
                     [["0", 70 * "é", "q", "[{[1]: 2}]"]])
    benchmark = open_benchmark(str(path))
    assert benchmark.rows[0]["answers"] == ["[{[1]: 2}]"]
    refused("ASCII", f"{path.name}, index 0", benchmark.images, 0)


def test_table_vqas_cells_are_taken_as_they_are(tmp_path):
    path = write_tsv(tmp_path / "TableVQABench.tsv", [*HEADER, "split"],
                     [["0", base64_of(0), "q", "['a', 'b']", "vwtq"],
                      ["1", "0", "q", "[]", "vwtq"]])
    assert [row["answers"] for row in open_benchmark(str(path)).rows] == [["['a', 'b']"], ["[]"]]


def test_an_image_by_reference_to_a_reference_and_in_the_datasets_own_folder(tmp_path):
    path = write_tsv(tmp_path / "DocVQA_VAL.tsv", HEADER,
                     [["0", base64_of(0), "q", "a"], ["1", "0", "q", "a"], ["2", "1", "q", "a"],
                      ["3", "4", "q", "a"], ["4", "3", "q", "a"]])
    benchmark = open_benchmark(str(path))
    assert all(same(benchmark.images(i)[0], picture(0)[0]) for i in range(3))
    refused("points back", f"{path.name}, index 3", benchmark.images, 3)
    folder = tmp_path / "images" / "DocVQA_VAL"
    folder.mkdir(parents=True)
    (folder / "5.png").write_bytes(picture(5)[1])
    path.write_text("index\tquestion\tanswer\timage_path\n0\tq\ta\t5.png\n")
    assert same(open_benchmark(str(path)).images(0)[0], picture(5)[0])


@pytest.mark.parametrize("cell", ["[]", "[" + " " * 80 + "]"])
def test_an_empty_list_of_images_is_no_page(tmp_path, cell):
    column = "image_path" if len(cell) == 2 else "image"
    path = tmp_path / "DocVQA_VAL.tsv"
    path.write_text(f"index\tquestion\tanswer\t{column}\n0\tq\ta\t{cell}\n")
    refused("no image", "index 0", open_benchmark(str(path)).images, 0)


@pytest.mark.parametrize("name, benchmark", [
    ("TableVQABench_vwtq.tsv", "TableVQABench"), ("tablevqa-vwtq_syn.tsv", "TableVQABench"),
    ("vwtq.tsv", None), ("WTQ.tsv", "WTQ"), ("dev_WTQ.jsonl", "WTQ"), ("val_wtq.tsv", "WTQ"),
    ("ChartQA_TEST.tsv", "ChartQA"), ("ChartQA_processed.jsonl", "ChartQA"),
    ("ChartQAPro.tsv", None), ("DocVQA_VAL.tsv", "DocVQA"), ("MPDocVQA_VAL.tsv", None),
    ("MP-DocVQA/val.tsv", None), ("SlideDocVQA.tsv", None)])
def test_a_name_that_only_holds_a_benchmarks_name_tells_none(name, benchmark):
    if benchmark:
        assert name_of(name) == benchmark
    else:
        refused("tells no benchmark", name, name_of, name)


def test_a_file_of_predictions_may_lie_in_any_folder(tmp_path):
    assert benchmark_file(f"toy={tmp_path}/lr=1e-5/mine.jsonl") == (
        "toy", tmp_path / "lr=1e-5" / "mine.jsonl")


def test_vcr_in_chinese_is_refused(tmp_path):
    path = write_tsv(tmp_path / "VCR_ZH_EASY_500.tsv", HEADER, [["0", base64_of(0), "q", "['a']"]])
    refused("in Chinese", path.name, open_benchmark, str(path))


def test_vcr_from_parquet_and_from_tsv(tmp_path):
    blanks = [["a b c d e", "f g"], ["h"], ["i j"]]
    folder = tmp_path / "VCR-wiki-en-hard" / "data"
    folder.mkdir(parents=True)
    for part, some in enumerate([range(2), range(2, 3)]):
        table = {"stacked_image": [{"bytes": picture(i)[1], "path": None} for i in some],
                 "crossed_text": [blanks[i] for i in some], "caption": ["x"] * len(some)}
        pyarrow.parquet.write_table(pyarrow.table(table),
                                    folder / f"test-0000{part}-of-00002.parquet")
    (folder / "train-00000-of-00001.parquet").write_bytes(b"not looked at")
    tsv = write_tsv(tmp_path / "VCR-wiki-en-easy-test-500.tsv",
                    ["index", "question", "answer", "image"],
                    [[i, VCR_PROMPT, repr(texts), base64_of(i)] for i, texts in enumerate(blanks)])
    for path, name in [(folder, "VCR-hard"), (tsv, "VCR-easy")]:
        benchmark = open_benchmark(str(path))
        assert benchmark.name == name and [row["answers"] for row in benchmark.rows] == blanks
        assert benchmark.prompts == [VCR_PROMPT] * 3
        assert all(same(benchmark.images(i)[0], picture(i)[0]) for i in range(3))
    one_file = folder / "test-00000-of-00002.parquet"
    assert len(open_benchmark(f"VCR-easy={one_file}").rows) == 2


def test_the_toys_documents_are_one_more_benchmark():
    benchmark, documents = open_benchmark("toy=7"), held_out_documents(7, 0)
    assert [row["answers"] for row in benchmark.rows] == [[gold] for _, _, gold in documents]
    assert benchmark.prompts == [prompt for _, prompt, _ in documents]
    assert len(open_benchmark("toy").rows) == 200
    assert [row["split"] for row in benchmark.rows[:2]] == ["invoice", "receipt"]
    page, _, _ = documents[6]
    assert same(benchmark.images(6)[0], draw(page))


def test_nothing_is_written_into_the_shipped_model(tmp_path):
    """By whatever name: it is the default."""
    for name in ([], ["--checkpoint", os.path.relpath(CHECKPOINT, tmp_path)]):
        run(ROOT / "eval.py", *name, "--benchmark", "toy=1", "--max-new-tokens", 2, cwd=tmp_path)
        (tmp_path / "out" / "shipped" / "eval" / "toy.jsonl").unlink()
    assert not (CHECKPOINT / "eval").exists()


def test_the_default_is_the_shipped_model_on_held_out_drawn_pages(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    args = evaluation.parse_args()
    assert args.checkpoint == CHECKPOINT and args.benchmark == ["reader-drawn"]


# -------------------------------------------------------------------------------------------------
# Damaged and odd files: one line that names the file


def test_a_damaged_tsv(docvqa):
    good = docvqa.read_text(encoding="utf-8")
    cases = {
        "no column answer": good.replace("answer", "gold"),
        "no column index": "",
        "neither": good.replace("image", "picture"),
        "two columns answer": good.replace("question", "answer", 1),
        "two rows": good.replace("\n7\t", "\n0\t"),
        "fields, not 4": good + "13\tx\n",
        "not a single": good.splitlines()[0] + "\n",
        "index 14: its answer is an empty list": f"{good}14\t{base64_of(2)}\tq\t[]\n",
        "no columns in the row": good + '14\t"' + base64_of(2),
        "no columns in .* is quoted": f'{good}14\t{base64_of(2)}\t"Total" is?\ta\n',
        "UTF-8": good.encode() + b"\xff\xfe\t1\t2\t3\n"}
    for says, text in cases.items():
        docvqa.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(says, docvqa.name, open_benchmark, str(docvqa))


def test_blank_lines_data_uris_and_capitals_in_a_tsv(tmp_path):
    path = write_tsv(tmp_path / "DocVQA_VAL.TSV", ["index", "image", "question", "answer"],
                     [["0", "data:image/png;base64," + base64_of(0), "q", "a"],
                      ["1", base64_of(1), '"so" it is', ""]])
    path.write_text(path.read_text().replace("\n", "\n\n") + "\n")
    benchmark = open_benchmark(str(path))
    assert [row["question"] for row in benchmark.rows] == ["q", '"so" it is']
    assert all(same(benchmark.images(i)[0], picture(i)[0]) for i in range(2))


def test_a_tsvs_damaged_images(docvqa):
    """They show only when an image is asked for."""
    cells = ["9", base64_of(1)[:200], "", base64_of(3), base64_of(1)[:-5]]
    write_tsv(docvqa, HEADER, [[str(i), cell, "q", "a"] for i, cell in enumerate(cells)])
    benchmark = open_benchmark(str(docvqa))
    for i, says in [(0, "'9'"), (1, "not a readable image"), (2, "no image"), (4, "index 4")]:
        refused(says, f"{docvqa.name}, index {i}", benchmark.images, i)
    assert same(benchmark.images(3)[0], picture(3)[0])


def test_a_foreign_split_and_a_benchmark_with_too_few_answers(tmp_path):
    tables = write_tsv(tmp_path / "TableVQABench.tsv", [*HEADER, "split"],
                       [["0", base64_of(0), "q", "a", "vwtq"], ["1", "0", "q", "a", "other"]])
    refused("index 1: its split is other", tables.name, open_benchmark, str(tables))
    text_vqa = write_doc_downstream(tmp_path, "TextVQA", [("q", "a")])
    refused("TextVQA_VAL.tsv", text_vqa.name, open_benchmark, str(text_vqa))


def test_a_damaged_jsonl(tmp_path):
    jsonl = write_doc_downstream(tmp_path, "WikiTableQuestions", [("q", "a"), ("r", "b")])
    first, second = jsonl.read_text().splitlines()
    for bad in ["{", "[1]", '{"messages": []}', first.replace("assistant", "user"),
                first.replace('"a"', "3"), first.replace('"image"', '"picture"'),
                first.replace("|>q", r"|>\ud800")]:
        jsonl.write_text("\n".join([first, "", bad]))
        refused("line 3", jsonl.name, open_benchmark, str(jsonl))
    # However a record names its image, as in training.
    named = [json.loads(line) for line in (first, second)]
    [named[0]["image"]] = named[0]["image"]
    named[1]["images"] = named[1].pop("image")
    jsonl.write_text("\n".join(map(json.dumps, named)))
    benchmark = open_benchmark(str(jsonl))
    assert all(len(benchmark.images(i)) == 1 for i in range(2))
    jsonl.write_text("\n".join([first, second.replace("pngs/1", "pngs/5")]))
    benchmark = open_benchmark(str(jsonl))
    refused("line 2: .*pngs/5.png: no such file", jsonl.name, benchmark.images, 1)


def test_what_is_no_benchmark(tmp_path, docvqa, monkeypatch):
    broken = tmp_path / "vcr-easy-test.parquet"
    broken.write_bytes(b"PAR1 nothing")
    other = tmp_path / "vcr-hard-test.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"crossed_text": [["a"], []]}), other)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "imgs").mkdir()
    for spec, says in [
            (broken, "not VCR-wiki"),
            (other, "row 1"),
            (tmp_path / "none.tsv", "tells no benchmark"),
            (f"WTQ={tmp_path / 'none.tsv'}", "No such file"),
            (f"Foo={docvqa}", "is called Foo"),
            (f"WTQ={tmp_path / 'notes.txt'}", "neither .tsv"),
            (f"KLC={tmp_path / 'imgs'}", "no test"),
            ("toy=x", "number"),
            ("toy=0", "number"),
            ("", "tells no benchmark")]:
        refused(says, "", open_benchmark, str(spec))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", other.name, open_benchmark, str(other))


@pytest.mark.parametrize("name", ["../../secret.png", "/secret.png", "imgs/../../../secret.png"])
def test_a_file_names_no_image_outside_its_folder(tmp_path, name):
    """Someone else's benchmark does not say which of this machine's files are read."""
    picture(0)[0].save(tmp_path / "secret.png")
    name = str(tmp_path / "secret.png") if name.startswith("/") else name
    path = write_doc_downstream(tmp_path / "set", "DocVQA", [("q", "a")])
    record = {**json.loads(path.read_text()), "image": [name]}
    path.write_text(json.dumps(record) + "\n")
    tsv = tmp_path / "set" / "ChartQA_TEST.tsv"
    tsv.write_text(f"index\tquestion\tanswer\timage_path\n0\tq\ta\t{name}\n")
    for file in (path, tsv):
        refused("outside of", file.name, open_benchmark(str(file)).images, 0)


# -------------------------------------------------------------------------------------------------
# Predictions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy with random weights: what it says is nonsense, but other nonsense for each page."""
    folder = tmp_path_factory.mktemp("model")
    write_toy_tokenizer(folder / "tokenizer.model")
    model = randomise(AlignVLM(ALIGNVLM_PRESETS["toy"]))
    with torch.no_grad():       # or it would repeat the last token, whatever it sees
        model.llm.embed_tokens.weight.mul_(0.03)
    model.save_pretrained(folder / "stage3", folder / "tokenizer.model", torch.float32)
    return folder / "stage3"


@pytest.fixture(scope="module")
def model(folder):
    model = AlignVLM.from_pretrained(folder).eval()
    return model, Tokenizer(folder, model.config.llm.vocab_size)


@pytest.fixture(scope="module")
def alone():
    """The only process, as start_processes makes it where there is no torchrun."""
    evaluation.start_processes()
    yield
    dist.destroy_process_group()


def settings(**changes):
    return {"max_new_tokens": 6, "max_tiles": 9, "noise": 0.0, **changes}


def predict_rows(model, benchmark, out, batch_size=2, **changes):
    return evaluation.predict(*model, benchmark, str(out / "toy"), settings(**changes), batch_size)


def predict(model, out, spec="toy=9", batch_size=4, **changes):
    predict_rows(model, open_benchmark(spec), out, batch_size, **changes)
    return (out / "toy.jsonl").read_bytes()


@pytest.fixture(scope="module")
def expected(model, alone, tmp_path_factory):
    """One by one, in one go."""
    text = predict(model, tmp_path_factory.mktemp("expected"), batch_size=1)
    said = {json.loads(line)["prediction"] for line in text.splitlines()}
    assert len(said) > 5, "all alike: shows nothing"
    return text


def test_batched_is_one_by_one_and_says_what_answer_says(model, expected, tmp_path):
    assert predict(model, tmp_path) == expected
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["toy.jsonl", "toy.settings.json"]
    rows = [json.loads(line) for line in expected.splitlines()]
    for i, (row, (page, prompt, gold)) in enumerate(zip(rows, held_out_documents(9, 0))):
        *_, [text] = evaluation.answer(*model, [draw(page)], [prompt], max_new_tokens=6)
        assert row == {"index": i, "question": prompt, "answers": [gold], "split": page.kind,
                       "prediction": text}


@pytest.mark.parametrize("stops, cut", [(1, b""), (4, b'{"sample": 8, "predi'), (5, b""),
                                        (8, b"{")])
def test_an_interrupted_evaluation_continues(model, expected, tmp_path, monkeypatch, stops, cut):
    """At any sample, and in the middle of a line; another rank's file is there too.

    Nothing is done twice.
    """
    asked, once = [], [stops]
    benchmark, whole = open_benchmark("toy=9"), open_benchmark("toy=9")

    def images(i):
        if once and i == once[0]:
            raise KeyboardInterrupt
        asked.append(i)
        return whole.images(i)

    monkeypatch.setattr(benchmark, "images", images)
    with pytest.raises(KeyboardInterrupt):
        predict_rows(model, benchmark, tmp_path)
    part = tmp_path / "toy.rank0"
    done = part.read_bytes().splitlines(keepends=True)
    assert len(done) == stops // 2 * 2 and not (tmp_path / "toy.jsonl").exists()
    part.write_bytes(b"".join(done[1:]) + cut)
    (tmp_path / "toy.rank3").write_bytes(b"".join(done[:1]) + cut)      # of a run on 4 processes
    asked.clear()
    once.clear()
    predict_rows(model, benchmark, tmp_path)
    assert (tmp_path / "toy.jsonl").read_bytes() == expected
    assert asked == [*range(len(done), 9)]
    predict_rows(model, benchmark, tmp_path)
    assert asked == [*range(len(done), 9)] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("line", [{"sample": "3", "prediction": "x"}, {"prediction": "x"},
                                  {"sample": 1}])
def test_foreign_lines_among_the_ranks_are_one_line(model, expected, tmp_path, line):
    predict(model, tmp_path / "other")
    record = (tmp_path / "other" / "toy.settings.json").read_bytes()
    (tmp_path / "toy.settings.json").write_bytes(record)
    (tmp_path / "toy.rank1").write_text(json.dumps(line) + "\n")
    refused("not predictions", "toy.rank1", predict, model, tmp_path)
    assert (tmp_path / "toy.rank1").exists()


def test_a_rank_that_wrote_elsewhere_is_missed(model, tmp_path, monkeypatch):
    """Nodes that share no folder: the first rank has a part of the predictions alone."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(evaluation, "open_log", lambda path: open(there / path.name, "a"))
    with pytest.raises(InputError, match="9 predictions are missing"):
        predict(model, tmp_path)
    assert not (tmp_path / "toy.jsonl").exists()


def test_a_kill_while_the_files_are_joined_loses_nothing(model, expected, tmp_path, monkeypatch):
    def replace(old, new):
        if str(new).endswith(".jsonl"):
            raise OSError("killed")
        shutil.move(old, new)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="killed"):
        predict(model, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "toy.rank0").exists()
    monkeypatch.setattr(evaluation, "answer", None)         # there is nothing left to be answered
    assert predict(model, tmp_path) == expected


def test_other_settings_are_refused_in_one_line(model, expected, tmp_path):
    predict(model, tmp_path)
    for spec, changes in [("toy=9", {"max_new_tokens": 7}), ("toy=9", {"max_tiles": 4}),
                          ("toy=9", {"noise": 1.0}), ("toy=8", {}), ("toy=9", {"weights": 5})]:
        with pytest.raises(InputError, match="take another --out") as error:
            predict(model, tmp_path, spec, **changes)
        assert "toy.jsonl" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "toy.settings.json").unlink()
    with pytest.raises(InputError, match="take another --out"):
        predict(model, tmp_path)
    assert (tmp_path / "toy.jsonl").read_bytes() == expected


def test_ranks_share_the_samples(model, expected, tmp_path, monkeypatch):
    """Two ranks in one process: where the first waits for the second, the second does its part."""
    rank, asked, benchmark = [0], [], open_benchmark("toy=9")
    page = benchmark.images
    benchmark.images = lambda i: asked.append(i) or page(i)

    def second():
        if rank[0] == 0:
            rank[0] = 1
            assert predict_rows(model, benchmark, tmp_path) == []
            rank[0] = 0

    fake = {"get_rank": lambda: rank[0], "get_world_size": lambda: 2, "barrier": second,
            "broadcast_object_list": lambda done: done.__setitem__(0, set())}
    for name, function in fake.items():
        monkeypatch.setattr(evaluation.dist, name, function)
    predict_rows(model, benchmark, tmp_path)
    assert asked == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert (tmp_path / "toy.jsonl").read_bytes() == expected


def test_two_ranks_write_the_file_that_one_does(folder, expected, tmp_path):
    """With torchrun, the whole command; noise, and a TSV beside the toy."""
    tsv = write_tsv(tmp_path / "DocVQA_VAL.tsv", HEADER, DOCVQA)
    command = ["--checkpoint", folder, "--benchmark", "toy=9", tsv, "--max-new-tokens", 6,
               "--noise", 3]
    torchrun(2, "eval.py", *command, "--out", tmp_path / "two", "--batch-size", 2)
    one = main(*command, "--out", tmp_path / "one", "--batch-size", 3)
    assert (tmp_path / "two" / "toy.jsonl").read_bytes() == expected
    names = {path.name for path in (tmp_path / "two").iterdir()}
    stems = ("toy", "DocVQA", "toy.noise-3", "DocVQA.noise-3")
    written = {f"{stem}{end}" for stem in stems for end in (".jsonl", ".settings.json")}
    assert names == written | {"scores.json", "table.md", ".lock"}
    for stem in stems:
        name = f"{stem}.jsonl"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    two = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert two["scores"] == one["scores"] and two["intervals"] == one["intervals"]
    for name in ("toy", "DocVQA"):
        [noisy_one], [noisy_two] = one["noise"][name], two["noise"][name]
        assert noisy_one.pop("interval") == noisy_two.pop("interval")
        assert noisy_two == pytest.approx(noisy_one, rel=1e-4)


def main(*argv):
    """The command in this process; its scores.json. The process group is the command's own."""
    there = dist.is_initialized()
    if there:
        dist.destroy_process_group()
    before, sys.argv = sys.argv, ["eval.py", *map(str, argv)]
    try:
        evaluation.main()
    finally:
        sys.argv = before
        if dist.is_initialized():
            dist.destroy_process_group()
        if there:
            evaluation.start_processes()
    out = argv[argv.index("--out") + 1]
    return json.loads((out / "scores.json").read_text())


def test_the_table_is_of_all_that_was_measured_and_score_says_the_same(folder, tmp_path, capsys):
    tsv = write_tsv(tmp_path / "DocVQA_VAL.tsv", HEADER, DOCVQA)
    jsonl = write_doc_downstream(tmp_path, "TabFact", [("q", "true"), ("r", "false")])
    out = tmp_path / "eval"
    common = "--checkpoint", folder, "--max-new-tokens", 3, "--out", out
    main(*common, "--benchmark", f"TabFact={jsonl}")
    results = main(*common, "--benchmark", tsv, "toy=5", "--limit", 2)
    assert set(results["scores"]) == {"TabFact", "DocVQA", "toy"}
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert len(read_predictions(out / "DocVQA.jsonl")) == 2
    scored = [out / f"{name}.jsonl" for name in ("TabFact", "DocVQA", "toy")]
    again = main("--score", *scored, "--out", tmp_path / "again")
    assert again["scores"] == results["scores"]
    without_model = (tmp_path / "again" / "table.md").read_text()
    assert without_model == table.replace(str(folder), "these predictions")
    with pytest.raises(InputError, match="another --out"):
        main(*common, "--benchmark", tsv, "toy=5", "--limit", 1)
    with pytest.raises(InputError, match="a model's own scores"):
        main("--score", *scored, "--out", out)
    (out / "scores.json").unlink()
    with pytest.raises(InputError, match="not from eval.py"):
        main(*common, "--benchmark", tsv)
    with pytest.raises(InputError, match="not from eval.py"):
        main("--score", *scored, "--out", out)
    assert (out / "table.md").read_text() == table
    (out / "scores.json").write_text('{"weights": 1}')
    with pytest.raises(InputError, match="another model"):
        main(*common, "--benchmark", tsv)
    del results["intervals"]["toy"]["exact_match"]
    (out / "scores.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="not as eval.py writes it"):
        main(*common, "--benchmark", tsv)


def test_bad_predictions_are_one_line(tmp_path):
    path = tmp_path / "WTQ.jsonl"
    row = {"index": 0, "question": "q", "answers": ["a"], "split": None, "prediction": "a"}
    wrong = [{"answers": []}, {"prediction": None}, {"split": [1]}, {"document": [1]},
             {"values": "2"}, {"values": 0}, {"values": True}, {"values": 10 ** 400}]
    for text in ["", "{", "[]", *(json.dumps(row | change) for change in wrong)]:
        path.write_text(text)
        with pytest.raises(InputError, match="WTQ.jsonl"):
            evaluation.score_files([str(path)], None)
    path.write_text(json.dumps(row))
    blank = tmp_path / "blank.jsonl"        # as of a split whose answers are kept back
    blank.write_text(2 * (json.dumps(row | {"answers": [" "]}) + "\n"))
    for specs, says in [
            ([str(tmp_path / "none.jsonl")], "no benchmark none"),
            ([str(path)] * 2, "second"),
            ([f"TableVQABench={path}"], "split is None"),
            ([f"KLC={tmp_path / 'none.jsonl'}"], "No such file"),
            ([f"DocVQA={blank}"], "blank.jsonl: not a single answer"),
            ([f"Foo={path}"], "no benchmark Foo")]:
        with pytest.raises(InputError, match=says):
            evaluation.score_files(specs, None)


def test_bad_input_is_one_line_and_exit_status_2(docvqa):
    docvqa.write_text("index\tquestion")
    done = run("eval.py", "--benchmark", docvqa, code=2)
    assert done.stderr.startswith(f"eval.py: {docvqa}: no column answer")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("argv", [
    ["--limit", "0"], ["--batch-size", "0"], ["--noise", "0"], ["--noise", "nan"],
    ["--noise", "1", "--noise-relative", "1"]])
def test_impossible_options(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    with pytest.raises(SystemExit) as exit:
        evaluation.parse_args()
    assert exit.value.code == 2


def test_what_was_not_measured_is_null_in_json_and_is_kept(folder, tmp_path):
    """A set that is read aloud has no answers: that score is nan, which JSON does not have."""
    out = tmp_path / "eval"
    common = "--checkpoint", folder, "--max-new-tokens", 3, "--out", out, "--limit", 1
    main(*common, "--benchmark", "reader-a4", "--noise", 1)
    text = (out / "scores.json").read_text()
    assert "NaN" not in text and json.loads(text)["scores"]["reader-a4"]["exact_match"] is None
    assert "nan" not in (out / "table.md").read_text()
    both = main(*common, "--benchmark", "toy=2")
    # How many samples each score is of: a page has one that is read or one that is answered.
    measured = {name: {score: n for score, n in of_name.items() if n}
                for name, of_name in both["samples"].items()}
    assert measured == {"reader-a4": {"character_errors": 1, "character_errors article": 1},
                        "toy": {"exact_match": 1}}
    of_toy, = [line for line in (out / "table.md").read_text().splitlines()
               if line.startswith("| toy exact_match")]
    assert of_toy.endswith("| 1 |")
    older = {key: value for key, value in both.items() if key != "samples"}
    (out / "scores.json").write_text(json.dumps(older))
    assert main(*common, "--benchmark", "toy=2")["samples"] == {"toy": {"exact_match": 1}}
    assert both["scores"]["reader-a4"] == json.loads(text)["scores"]["reader-a4"]


def test_noise_is_averaged_over_the_benchmarks_that_have_the_same():
    def run_of(sigma, score):
        return {"sigma": sigma, "std_F": 1.0, "cosine_distance": score / 1000, "score": score,
                "interval": [score / 100, score / 100]}

    noise = {"DocVQA": [run_of(3.0, 40.0), run_of(1.0, 50.0)], "WTQ": [run_of(3.0, 20.0)],
             "toy": [run_of(2.0, 1.0)]}
    table = noise_table(noise, {"DocVQA": 60.0, "WTQ": 30.0, "toy": 90.0}, "ours")
    averages = [line for line in table.splitlines() if "| average of 2 |" in line]
    assert averages == ["| **ours** | average of 2 | 3 | - | - | 45.00 | 30.00 | - | 15.00 "
                        "| 0.0300 |"]
    alone = noise_table({"WTQ": noise["WTQ"]}, {"WTQ": 30.0}, "ours")
    assert "average of 1" not in alone
    assert alone.endswith("| **ours** | WTQ | 3 | 1 | 3 | 30.00 | 20.00 | 20.00 to 20.00 | 10.00 "
                          "| 0.0200 |\n")


def test_every_page_that_is_read_aloud_fits_into_the_longest_answer():
    """A token is a character there."""
    for name in READERS:
        golds = [gold for row in open_benchmark(name).rows for gold in row["answers"]]
        assert max(map(len, golds)) < evaluation.longest_answer(name)
    assert evaluation.longest_answer("DocVQA") == evaluation.longest_answer("toy") == 256


def test_a_fingerprint_is_of_names_and_numbers():
    """Else a model that is trained further would go on with the predictions of the earlier one."""
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    model.init_weights()
    before = evaluation.fingerprint(model)
    assert evaluation.fingerprint(model) == before
    with torch.no_grad():
        for part in (model.vision, model.connector, model.llm):
            p = next(part.parameters())
            p *= 1.01
            after = evaluation.fingerprint(model)
            assert after != before
            before = after


def test_the_toys_scores_are_over_all_of_its_pages(monkeypatch):
    """Of each page the first character is not read, and of one nothing; every second answer is
    wrong."""
    documents = held_out_documents(6, 3)
    texts = [page.text[1:] if i else "" for i, (page, _, _) in enumerate(documents)]
    said = [gold if i % 2 else gold + "?" for i, (_, _, gold) in enumerate(documents)]

    def answer(model, tokenizer, images, prompts):
        yield [""] * len(images)
        yield texts if prompts == [evaluation.READ] * len(images) else said

    monkeypatch.setattr(evaluation, "answer", answer)
    scores = evaluation.held_out_scores(None, None, 6, 3)
    lengths = [len(page.text) for page, _, _ in documents]
    assert scores["held-out"] == {"exact_match": 0.5, "n": 6,
                                  "cer": (lengths[0] + 5) / sum(lengths)}
    kinds = [page.kind for page, _, _ in documents]
    assert kinds[0] == kinds[5] and scores[kinds[0]] == {
        "exact_match": 0.5, "n": 2, "cer": (lengths[0] + 1) / (lengths[0] + lengths[5])}
    assert scores[kinds[1]] == {"exact_match": 1, "n": 1, "cer": 1 / lengths[1]}


def test_averages_are_over_what_was_measured():
    """The paper's own averages follow from its columns, cut off after two decimals."""
    for name, (*values, average) in TABLE_1.items():
        assert len(values) == len(COLUMNS)
        assert math.floor(sum(values) / 9 * 100 + 1e-9) / 100 == average, name
    text = score_tables({"WTQ": 50.0, "KLC": 30.0}, "ours")
    rows = {}
    for line in text.splitlines():
        cells = line.strip(" |").split(" | ")
        rows[cells[0].strip("*")] = cells
    assert rows["ours"] == ["**ours**", "-", "-", "-", "30.00", "50.00", "-", "-", "-", "-", "-",
                            "40.00"]
    assert rows["MLP, Llama-3.2-3B"][-2:] == ["53.06", f"{(33.36 + 28.94) / 2:.2f}"]
    with_nan = {"WTQ": 50.0, "KLC": 30.0, "TableVQABench": math.nan}
    assert score_tables(with_nan, "ours") == text
    others = {"VCR-hard": 1.0, "reader-pages": 9.0, "toy": 99.0}
    full = score_tables(dict.fromkeys(COLUMNS, 10.0) | others, "ours")
    for row in (" 10.00 |" * 11, " - | 1.00 |", " 99.00 | 9.00 |"):
        assert f"| **ours** |{row}\n" in full


# -------------------------------------------------------------------------------------------------
# Noise


def test_noise_statistics_are_the_naive_ones(model, alone, tmp_path):
    """F, F + N and both outputs by hand, a sample at a time, and what an evaluation reports."""
    vlm, tokenizer = model
    benchmark, sigma = open_benchmark("toy=5"), 0.7
    rows = predict_rows(model, benchmark, tmp_path, 3, noise=sigma)
    measured = json.loads((tmp_path / "toy.settings.json").read_text())["measured"]
    E_text = vlm.llm.embed_tokens.weight
    features, distances = [], []
    for i in range(5):
        [page] = benchmark.images(i)
        with torch.inference_mode():
            F = vlm.vision(tile(page, vlm.config.vision))
            generator = torch.Generator().manual_seed(zlib.crc32(f"toy/{i}".encode()))
            N = sigma * torch.randn(F.shape, generator=generator)
            clean = vlm.connector.p_vocab(F) @ E_text
            noisy = vlm.connector.p_vocab(F + N) @ E_text
        features.append(F.flatten())
        distances.append((1 - nnf.cosine_similarity(clean, noisy, dim=-1)).flatten())
        assert abs(N.std().item() - sigma) < 0.02
        # and the text is what the LLM says to the noisy embeddings
        turn = Turn("user", [IMAGE, benchmark.prompts[i]])
        prompt, _ = encode_chat([turn], tokenizer, [F.shape[0] * F.shape[1]])
        with torch.inference_mode():
            x = nnf.embedding(prompt.clamp(min=0), E_text)
            x[prompt == IMAGE] = noisy.flatten(0, 1)
        steps = vlm.llm.generate(x[None], [len(prompt)], tokenizer.stop, 6)
        assert tokenizer.decode([ids[0] for ids in steps]) == rows[i]["prediction"]
    std = torch.cat(features).double().std(unbiased=False).item()
    distance = torch.cat(distances).double().mean().item()
    assert measured["std_F"] == pytest.approx(std, rel=1e-6)
    assert measured["cosine_distance"] == pytest.approx(distance, rel=1e-3)
    pages = [benchmark.images(i) for i in range(5)]
    assert feature_std(vlm, pages, 9) == pytest.approx(measured["std_F"], rel=5e-3)
    assert not vlm.vision._forward_hooks and not vlm.connector._forward_hooks


def test_noise_of_nearly_nothing_changes_nothing(model, expected, tmp_path):
    assert predict(model, tmp_path, noise=1e-9) == expected
    measured = json.loads((tmp_path / "toy.settings.json").read_text())["measured"]
    assert abs(measured["cosine_distance"]) < 1e-5 and measured["std_F"] > 0.1


def test_an_interrupted_noisy_evaluation_is_the_uninterrupted_one(model, expected, tmp_path):
    whole = predict(model, tmp_path, noise=2.0, batch_size=9)
    assert whole != expected
    measured = json.loads((tmp_path / "toy.settings.json").read_text())["measured"]
    again = tmp_path / "again"
    again.mkdir()
    benchmark, undisturbed = open_benchmark("toy=9"), open_benchmark("toy=9")
    benchmark.images = lambda i: undisturbed.images(i) if i < 6 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict_rows(model, benchmark, again, noise=2.0)
    assert predict(model, again, noise=2.0, batch_size=2) == whole
    record = json.loads((again / "toy.settings.json").read_text())
    assert record["measured"] == pytest.approx(measured, rel=1e-5)


def test_relative_noise_is_in_standard_deviations_of_F(folder, model, alone, tmp_path):
    results = main("--checkpoint", folder, "--benchmark", "toy=4", "--max-new-tokens", 2,
                   "--noise-relative", 0.5, 2, "--out", tmp_path)
    runs = results["noise"]["toy"]
    relative = [run["sigma"] / run["std_F"] for run in runs]
    assert relative == pytest.approx([0.5, 2], rel=5e-3)
    assert runs[0]["cosine_distance"] < runs[1]["cosine_distance"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"toy.noise-0.5std.jsonl", "toy.noise-2std.jsonl"} < names
    measured = results["noise"]["toy"][1]["cosine_distance"]
    results["noise"]["toy"][1]["cosine_distance"] = 7.0         # measured again: the newer counts
    (tmp_path / "scores.json").write_text(json.dumps(results))
    again = main("--checkpoint", folder, "--benchmark", "toy=4", "--max-new-tokens", 2,
                 "--noise-relative", 2, "--out", tmp_path)
    assert [run["cosine_distance"] for run in again["noise"]["toy"]] == [
        runs[0]["cosine_distance"], measured]
    with noise_on(model[0], 0.0) as nothing:
        assert nothing is None
    measured = [{"distance": 1.0, "tokens": 4, "sum": 2.0, "squares": 10.0, "numbers": 2},
                {"distance": 2.0, "tokens": 2, "sum": 0.0, "squares": 2.0, "numbers": 2}]
    expected = {"std_F": (3 - 0.25) ** 0.5, "cosine_distance": 0.5}
    assert summary(measured) == pytest.approx(expected)
