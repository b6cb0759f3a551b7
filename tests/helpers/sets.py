"""What the tests of data sets share: the released formats written here, an epoch's samples read."""
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

from data import READ, Sample, Tokenizer, prepare
from plumbing.examples import IMAGE
from plumbing.formats import VCR_PROMPT
from plumbing.streams import BAD_KINDS, Bad, DataSet, Documents
from small_tokenizers import tokenizer  # noqa: F401: a fixture
from toy.pages import draw, held_out_documents
from vision import SIGLIP_PRESETS

TOY = SIGLIP_PRESETS["toy"]
N = 12          # samples of a data set, where one will do
# (image, its text, prompt, answer)
PAGES = [(draw(page), page.text, prompt, gold)
         for page, prompt, gold in held_out_documents(N, seed=5)]


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


# --------------------------------------------------------------------------------------------------
# Pieces


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(image: Image.Image, path: str | None = None) -> dict:
    """An image as parquet holds it."""
    return {"bytes": encoded(image), "path": path}


def turns_of(*asked_and_answered) -> list[tuple[str, list]]:
    """(parts of a question, answer) pairs -> (role, parts) pairs."""
    turns = []
    for asked, answered in asked_and_answered:
        turns += [("user", asked), ("assistant", [answered])]
    return turns


def messages(*asked_and_answered: tuple[str, str]) -> list[dict]:
    """(question, answer) pairs as MS-Swift writes them."""
    turns = []
    for asked, answered in asked_and_answered:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def add_member(tar: tarfile.TarFile, name: str, content: bytes = b"", **header) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar: tarfile.TarFile, key: str, image: Image.Image, caption: str,
               status: str = "success") -> None:
    """The members of one sample of img2dataset; a download that failed has no image."""
    row = {"url": f"https://example.com/{key}.jpg", "caption": caption, "key": key,
           "status": status, "error_message": None, "width": image.width, "height": image.height,
           "original_width": 800, "original_height": 600, "exif": "{}", "sha256": "00"}
    if status == "success":
        add_member(tar, f"{key}.jpg", encoded(image, "JPEG", quality=95))
        add_member(tar, f"{key}.txt", caption.encode())
    add_member(tar, f"{key}.json", json.dumps(row).encode())


def write_parquet(path: Path, columns: dict[str, list], **options) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(folder: Path, name: str, n: int) -> None:
    """A JSONL file of n samples without images, each with an answer of its own."""
    rows = [{"messages": messages(("?", f"{name}{i}"))} for i in range(n)]
    write_lines(folder / f"{name}.jsonl", rows)


def save_pages(folder: Path) -> None:
    """The images of PAGES, by their numbers."""
    for i, (image, *_) in enumerate(PAGES):
        image.save(folder / f"{i}.png")


# --------------------------------------------------------------------------------------------------
# The formats, as they are released. A writer returns what --data takes and the examples that must
# come out of it: ([(role, parts), ...], images).


def write_img2dataset(folder, failures=True):
    """Two tars with a failed download each; beside each tar lie its parquet and its statistics."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(shard, N, 2):
                add_sample(tar, f"{shard:05}{i:04}", PAGES[i][0], PAGES[i][1])
            if failures:
                add_sample(tar, f"{shard:05}9999", PAGES[0][0], "gone", status="failed_to_download")
        write_parquet(folder / f"{shard:05}.parquet",
                      {"url": ["https://example.com"], "caption": ["a sidecar"]})
        (folder / f"{shard:05}_stats.json").write_text(
            '{"count": 7, "successes": 6, "status_dict": {"success": 6}}')
    return folder, [(turns_of(([IMAGE], text)), [image]) for image, text, _, _ in PAGES]


def write_bigdocs(folder):
    """Two configs below the folder, the first one in several row groups, the second with two
    questions a page."""
    image = [stored(image, f"{i}.png") for i, (image, *_) in enumerate(PAGES)]
    common = {"dataset_name": ["-"] * N, "image_sha256": ["-"] * N,
              "sample_id": list(map(str, range(N))), "image": image}

    def write(config, split, query, annotations):
        (folder / config).mkdir(exist_ok=True)
        columns = {**common, "query": query, "annotations": annotations}
        write_parquet(folder / config / f"{split}-00000-of-00001.parquet", columns,
                      row_group_size=5)

    write("ArxivOCR", "train", [[READ]] * N, [[text] for _, text, _, _ in PAGES])
    write("TextOCR", "train", [[q, "again: " + q] for _, _, q, _ in PAGES],
          [[a, a + "!"] for *_, a in PAGES])
    write("TextOCR", "val", [["a page of"]] * N, [["the evaluation"]] * N)
    expected = []
    for image, text, q, a in PAGES:
        expected.append((turns_of(([IMAGE, READ], text)), [image]))
        expected.append((turns_of(([IMAGE, q], a), (["again: " + q], a + "!")), [image]))
    return folder, expected


def write_vcr(folder):
    other = [stored(Image.new("RGB", (9, 9)))] * N
    columns = {"question_id": list(range(N)), "image": other, "caption": ["-"] * N,
               "stacked_image": [stored(image) for image, *_ in PAGES],
               "only_it_image": other, "only_it_image_small": other,
               "crossed_text": [[a, "second"] for *_, a in PAGES]}
    write_parquet(folder / "train-00000-of-00001.parquet", columns, row_group_size=4)
    expected = [(turns_of(([IMAGE, VCR_PROMPT], f"{a}, second")), [image])
                for image, _, _, a in PAGES]
    return folder, expected


def write_docdownstream(folder):
    pngs = "imgs/DUE_Benchmark/DocVQA/pngs"
    (folder / pngs).mkdir(parents=True)
    save_pages(folder / pngs)
    rows = [{"image": [f"./{pngs}/{i}.png"], "messages": messages(("<|image|>" + q, a)),
             "task_name": "qa_sft", "dataset_name": "DocVQA"}
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
    save_pages(folder)
    rows = []
    expected = []
    for i, (image, _, q, a) in enumerate(PAGES):
        said = [{"from": "human", "value": f"{q}\n<image>"}, {"from": "gpt", "value": a},
                {"from": "human", "value": decoy}, {"from": "gpt", "value": decoy + a}]
        rows.append({"id": f"{i}", "image": f"{i}.png", "conversations": said})
        expected.append((turns_of(([f"{q}\n", IMAGE], a), ([decoy], decoy + a)), [image]))
    (folder / "llava.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    return folder, expected


def write_swift(folder):
    """MS-Swift: two images without marks, several turns with a system message; two images with
    marks; text alone."""
    save_pages(folder)
    rows = []
    expected = []
    system = {"role": "system", "content": "Be brief."}
    for i, (image, text, q, a) in enumerate(PAGES):
        other = (i + 1) % N
        names = [f"{i}.png", f"{other}.png"]
        images = [image, PAGES[other][0]]
        said = messages(("Q", a), ("<b>", text))
        rows += [{"messages": [system, *said], "images": names},
                 {"messages": messages((f"<image>{q}<image>?", text)), "images": names},
                 {"messages": said}]
        again = (["<b>"], text)
        with_system = [("system", ["Be brief."]), *turns_of(([IMAGE, IMAGE, "Q"], a), again)]
        expected += [(with_system, images),
                     (turns_of(([IMAGE, q, IMAGE, "?"], text)), images),
                     (turns_of((["Q"], a), again), [])]
    write_lines(folder / "swift.jsonl", rows)
    return folder / "swift.jsonl", expected


FORMATS = {"img2dataset": write_img2dataset, "BigDocs": write_bigdocs, "VCR-wiki": write_vcr,
           "DocDownstream": write_docdownstream, "LLaVA": write_llava,
           "LLaVA, indented": functools.partial(write_llava, indent=2), "MS-Swift": write_swift}


# --------------------------------------------------------------------------------------------------
# Readers


def one_epoch(data_set: DataSet) -> list[tuple]:
    """The references of an epoch in their order."""
    references = (reference for reference, _ in data_set.references())
    return list(itertools.takewhile(lambda reference: reference is not None, references))


def documents_of(specs: Path | str | list[str], tokenizer: Tokenizer, seed: int = 0,
                 **limits) -> Documents:
    """A data set's samples for the toy; limits: of data.prepare."""
    specs = specs if isinstance(specs, list) else [str(specs)]
    limits = {"max_text": 1024, "max_tokens": 2048, **limits}
    return Documents(specs, seed, functools.partial(prepare, tokenizer=tokenizer, config=TOY,
                                                    **limits))


def outcome(specs: Path | str | list[str], tokenizer: Tokenizer) -> list[Sample | Bad]:
    """Sample or Bad for every sample of an epoch, in the order of the files."""
    documents = documents_of(specs, tokenizer)
    items = [documents[0, *reference] for reference in sorted(one_epoch(documents.sets[0]))]
    for bad in items:
        if isinstance(bad, Bad):
            assert bad.kind in BAD_KINDS and isinstance(bad.why, str) and documents.where(bad)
    return items


# For scripts of the tests. ru_maxrss would be that of the process from which this one was forked,
# if that is larger.
PEAK = """
def peak():     # MB
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024
"""
