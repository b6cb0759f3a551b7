"""What the tests of data sets share: the released formats written here, and all samples of an epoch."""
import functools
import io
import itertools
import json
import signal
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data import IMAGE, READ, Tokenizer, prepare
from plumbing.formats import VCR_PROMPT
from plumbing.streams import BAD_KINDS, Bad, Documents
from toy.pages import draw, held_out_documents, write_toy_tokenizer
from vision import SIGLIP_PRESETS

TOY = SIGLIP_PRESETS["toy"]
N = 12                                                                  # samples of a data set, where one will do
PAGES = [(draw(page), page.text, prompt, gold) for page, prompt, gold in held_out_documents(N, seed=5)]


@pytest.fixture(autouse=True)
def no_hang():
    """Whatever a file makes its reader do, it ends."""
    def alarm(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


# ---------------------------------------------------------------------------------------------------------------------
# The formats, as they are released. A writer returns what --data takes and the examples that must come out of it:
# ([(role, parts), ...], images).


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turns_of(*asked_and_answered):
    return [(role, parts) for asked, answered in asked_and_answered
            for role, parts in [("user", asked), ("assistant", [answered])]]


def add_member(tar, name, content=b"", **header):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar, key, image, caption, status="success"):
    """The members of one sample of img2dataset; a download that failed has no image."""
    row = {"url": f"https://example.com/{key}.jpg", "caption": caption, "key": key, "status": status,
           "error_message": None, "width": image.width, "height": image.height, "original_width": 800,
           "original_height": 600, "exif": "{}", "sha256": "00"}
    if status == "success":
        add_member(tar, f"{key}.jpg", encoded(image, "JPEG", quality=95))
        add_member(tar, f"{key}.txt", caption.encode())
    add_member(tar, f"{key}.json", json.dumps(row).encode())


def write_img2dataset(folder, failures=True):
    """Two tars with a failed download each; beside each tar lie its parquet and its statistics."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard, N, 2):
                add_sample(tar, f"{shard:05}{i:04}", PAGES[i][0], PAGES[i][1])
            if failures:
                add_sample(tar, f"{shard:05}9999", PAGES[0][0], "gone", status="failed_to_download")
        write_parquet(folder / f"{shard:05}.parquet", {"url": ["https://example.com"], "caption": ["a sidecar"]})
        (folder / f"{shard:05}_stats.json").write_text('{"count": 7, "successes": 6, "status_dict": {"success": 6}}')
    return folder, [(turns_of(([IMAGE], text)), [image]) for image, text, _, _ in PAGES]


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def write_bigdocs(folder):
    """Two configs below the folder, the first one in several row groups, the second with two questions a page."""
    image = [{"bytes": encoded(image), "path": f"{i}.png"} for i, (image, *_) in enumerate(PAGES)]
    common = {"dataset_name": ["-"] * N, "image_sha256": ["-"] * N, "sample_id": list(map(str, range(N))),
              "image": image}
    for config, split, query, annotations in [
            ("ArxivOCR", "train", [[READ]] * N, [[text] for _, text, _, _ in PAGES]),
            ("TextOCR", "train", [[q, "again: " + q] for _, _, q, _ in PAGES], [[a, a + "!"] for *_, a in PAGES]),
            ("TextOCR", "val", [["a page of"]] * N, [["the evaluation"]] * N)]:
        (folder / config).mkdir(exist_ok=True)
        write_parquet(folder / config / f"{split}-00000-of-00001.parquet",
                      {**common, "query": query, "annotations": annotations}, row_group_size=5)
    return folder, [(turns_of(*pairs), [image]) for image, text, q, a in PAGES
                    for pairs in ([([IMAGE, READ], text)], [([IMAGE, q], a), (["again: " + q], a + "!")])]


def write_vcr(folder):
    images = [{"bytes": encoded(image), "path": None} for image, *_ in PAGES]
    other = [{"bytes": encoded(Image.new("RGB", (9, 9))), "path": None}] * N
    write_parquet(folder / "train-00000-of-00001.parquet",
                  {"question_id": list(range(N)), "image": other, "caption": ["-"] * N, "stacked_image": images,
                   "only_it_image": other, "only_it_image_small": other,
                   "crossed_text": [[a, "second"] for *_, a in PAGES]}, row_group_size=4)
    return folder, [(turns_of(([IMAGE, VCR_PROMPT], f"{a}, second")), [image]) for image, _, _, a in PAGES]


def write_docdownstream(folder):
    pngs = "imgs/DUE_Benchmark/DocVQA/pngs"
    (folder / pngs).mkdir(parents=True)
    for i, (image, *_) in enumerate(PAGES):
        image.save(folder / pngs / f"{i}.png")
    rows = [{"image": [f"./{pngs}/{i}.png"], "messages": [{"role": "user", "content": "<|image|>" + q},
             {"role": "assistant", "content": a}], "task_name": "qa_sft", "dataset_name": "DocVQA"}
            for i, (_, _, q, a) in enumerate(PAGES)]
    write_lines(folder / "train.jsonl", rows)
    for row in rows:
        row["messages"][1]["content"] = "the evaluation"
    write_lines(folder / "val.jsonl", rows)
    (folder / "test").mkdir()
    write_lines(folder / "test" / "DocVQA_test.jsonl", rows)
    return folder, [(turns_of(([IMAGE, q], a)), [image]) for image, _, q, a in PAGES]


def write_llava(folder, indent=None):
    """One JSON list. The texts hold what a search for records could take for one."""
    decoy = 'Größe {"conversations": [{"from": "gpt", "value": "no"}]}, ] \\ {}[{ 木'
    rows, expected = [], []
    for i, (image, _, q, a) in enumerate(PAGES):
        image.save(folder / f"{i}.png")
        first = {"from": "human", "value": f"{q}\n<image>"}, {"from": "gpt", "value": a}
        again = {"from": "human", "value": decoy}, {"from": "gpt", "value": decoy + a}
        rows.append({"id": f"{i}", "image": f"{i}.png", "conversations": [*first, *again]})
        expected.append((turns_of(([f"{q}\n", IMAGE], a), ([decoy], decoy + a)), [image]))
    (folder / "llava.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    return folder, expected


def write_swift(folder):
    """MS-Swift: two images with marks and without, several turns with a system message, text alone."""
    for i, (image, *_) in enumerate(PAGES):
        image.save(folder / f"{i}.png")
    rows, expected = [], []
    for i, (image, text, q, a) in enumerate(PAGES):
        other = (i + 1) % N
        system, pair = {"role": "system", "content": "Be brief."}, [("Q", a), ("<b>", text)]
        said = [{"role": role, "content": content} for turn in pair
                for role, content in zip(("user", "assistant"), turn)]
        asked = {"role": "user", "content": f"<image>{q}<image>?"}, {"role": "assistant", "content": text}
        rows += [{"messages": [system, *said], "images": [f"{i}.png", f"{other}.png"]},
                 {"messages": list(asked), "images": [f"{i}.png", f"{other}.png"]},
                 {"messages": said}]
        expected += [([("system", ["Be brief."]), *turns_of(([IMAGE, IMAGE, "Q"], a), (["<b>"], text))],
                      [image, PAGES[other][0]]),
                     (turns_of(([IMAGE, q, IMAGE, "?"], text)), [image, PAGES[other][0]]),
                     (turns_of((["Q"], a), (["<b>"], text)), [])]
    write_lines(folder / "swift.jsonl", rows)
    return folder / "swift.jsonl", expected


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FORMATS = {"img2dataset": write_img2dataset, "BigDocs": write_bigdocs, "VCR-wiki": write_vcr,
           "DocDownstream": write_docdownstream, "LLaVA": write_llava,
           "LLaVA, indented": lambda folder: write_llava(folder, indent=2), "MS-Swift": write_swift}


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def one_epoch(data_set):
    return [ref for ref, _ in itertools.takewhile(lambda item: item[0] is not None, data_set.references())]


def write_texts(folder, name, n):
    question = {"role": "user", "content": "?"}
    write_lines(folder / f"{name}.jsonl", [
        {"messages": [question, {"role": "assistant", "content": f"{name}{i}"}]} for i in range(n)])


def texts(path, tokenizer, seed=0):
    return Documents([str(path)] if isinstance(path, Path) else path, seed,
                     functools.partial(prepare, tokenizer=tokenizer, config=TOY, max_text=1024, max_tokens=2048))


def outcome(path, tokenizer):
    """Sample or Bad for every sample of an epoch, in the order of the files."""
    documents = texts(path, tokenizer)
    items = [documents[0, *reference] for reference in sorted(one_epoch(documents.sets[0]))]
    for bad in (item for item in items if isinstance(item, Bad)):
        assert bad.kind in BAD_KINDS and isinstance(bad.why, str) and documents.where(bad)
    return items


PEAK = """
def peak():     # MB; ru_maxrss would be that of the process from which this one was forked, if that is larger
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
"""
