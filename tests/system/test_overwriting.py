"""What is read is never written over, by whatever name; drawn pages replace only their own."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from conftest import run, sample
from plumbing.files import OwnFiles, refuse_inputs
from plumbing.settings import InputError
from reader.hard import make
from shipped import ANSWER, CHECKPOINT, PAGE, PROMPT
from toy.pages import STAGE0, draw_pages


def sums(folder: Path) -> dict[str, str]:
    """The content of every file in a folder, by its name."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def page(tmp_path) -> Path:
    """A page, and files of other names that are the same one."""
    page = tmp_path / "page.png"
    shutil.copyfile(PAGE, page)
    (tmp_path / "sub").mkdir()
    os.link(page, tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("page.png")
    (tmp_path / "folder").symlink_to(".")
    return page


@pytest.fixture
def questions(page) -> Path:
    path = page.with_name("questions.jsonl")
    path.write_text(json.dumps({"image": "page.png", "prompt": PROMPT}) + "\n")
    return path


SAME = ["page.png", "./page.png", "sub/../page.png", "hard.png", "soft.png", "folder/page.png"]


@pytest.mark.parametrize("name", SAME)
def test_a_picture_over_the_page(page, name):
    before = sums(page.parent)
    out = f"{page.parent}/{name}"
    done = sample("--image", page, "--explain", out, code=2)
    [line] = done.stderr.splitlines()
    assert line.startswith(f"sample.py: {Path(out)}: would be written over {page}")
    assert sums(page.parent) == before


def test_one_of_several_pictures_over_a_page(page):
    before = sums(page.parent)
    numbered = page.with_name("page-2.png")
    shutil.copyfile(page, numbered)
    done = sample("--image", numbered, PAGE, "--explain", page, code=2)
    assert "page-2.png: would be written over" in done.stderr.splitlines()[-1]
    numbered.unlink()
    (page.parent / "hard.html").hardlink_to(page)
    done = sample("--image", page, "--explain", page.with_name("hard.html"), code=2)
    assert "hard.html: would be written over" in done.stderr.splitlines()[-1]
    (page.parent / "hard.html").unlink()
    assert sums(page.parent) == before


@pytest.mark.parametrize("answers", ["questions.jsonl", "page.png", "hard.png", "folder/page.png",
                                     "again.jsonl"])
def test_answers_over_what_is_asked(page, questions, answers):
    os.link(questions, page.with_name("again.jsonl"))
    before = sums(page.parent)
    done = sample("--questions", questions, "--answers", page.parent / answers, code=2)
    assert "would be written over" in done.stderr.splitlines()[-1]
    assert sums(page.parent) == before


@pytest.mark.parametrize("row, said", [
    ({"prompt": "\ud800"}, "line 2: text with the lone surrogate"),
    ({"image": "x" * 300, "prompt": "?"}, "line 2: no file"),
    ({"question": "?"}, 'line 2: not an "image" and a "prompt", both texts, among image, question'),
    ([1], "line 2: not a JSON object"), ("{", "line 2: not JSON")])
def test_a_bad_row_is_found_before_the_first_answer(page, questions, row, said):
    with questions.open("a") as file:
        if isinstance(row, dict):
            row = json.dumps({"image": page.name, **row})
        file.write(f"{row}\n")
    done = sample("--questions", questions, "--answers", page.parent / "a.jsonl", code=2)
    assert f"{questions}, {said}" in done.stderr.splitlines()[-1]
    assert not list(page.parent.glob("a.jsonl*"))


def test_a_file_that_is_written_on_the_way_counts_too(page, questions):
    """answers.jsonl is written as answers.jsonl.partial first."""
    mine = page.with_name("answers.jsonl.partial")
    questions.rename(mine)
    before = sums(page.parent)
    done = sample("--questions", mine, "--answers", page.with_name("answers.jsonl"), code=2)
    assert "would be written over" in done.stderr.splitlines()[-1]
    assert sums(page.parent) == before


def test_answers_over_the_model(page, questions):
    model = page.with_name("model")
    shutil.copytree(CHECKPOINT, model)
    before = sums(model)
    os.link(model / "model.safetensors", page.with_name("tokens.png"))
    for option in (["--questions", questions, "--answers", model / "config.json"],
                   ["--image", page, "--explain", page.with_name("tokens.png")]):
        done = sample("--checkpoint", model, *option, code=2)
        assert "would be written over" in done.stderr.splitlines()[-1]
    assert sums(model) == before


def test_other_files_are_replaced_as_ever(page, questions):
    answers = page.with_name("answers.jsonl")
    answers.write_text("older")
    sample("--questions", questions, "--answers", answers)
    assert json.loads(answers.read_text())["prediction"] == ANSWER
    refuse_inputs(page.with_name("new.png"), [page, page.with_name("none.png")])


PREDICTION = {"index": "0", "question": "?", "answers": ["a"], "split": None, "prediction": "a"}


def test_scores_and_tables_over_predictions_and_benchmarks(page):
    folder = page.parent / "eval"
    folder.mkdir()
    for name in ("table.md", "scores.json", "toy.jsonl", "b.jsonl"):
        (folder / name).write_text(json.dumps(PREDICTION) + "\n")
    benchmark = folder / "ChartQA.jsonl"
    benchmark.write_text(json.dumps({"image": ["page.png"], "messages": [
        {"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": "a"}]}) + "\n")
    before = sums(folder)
    toy = folder / "toy.jsonl"
    for command in (
            ["eval.py", "--score", f"toy={folder}/table.md", "--out", folder],
            ["eval.py", "--score", f"toy={folder}/scores.json", "--out", folder],
            ["eval.py", "--benchmark", f"ChartQA={benchmark}", "--out", folder],
            ["-m", "paper.compare", toy, folder / "b.jsonl", "--out", toy],
            ["-m", "paper.compare", toy, folder / "b.jsonl", "--out", folder / "b.jsonl"]):
        line = run(*command, code=2).stderr.splitlines()[-1]
        assert "would be written over" in line, command
    assert sums(folder) == before


def test_a_plot_over_a_log(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"step": 0, "loss": 1.0, "lr": 1.0, "tokens_per_s": 1.0}) + "\n")
    (tmp_path / "plot.png").symlink_to(log)
    table = tmp_path / "curves.csv"
    run("-m", "paper.curves", tmp_path / "run", "--csv", table)
    before = sums(tmp_path)
    for command in ([tmp_path / "run", "--csv", log], [tmp_path, "--out", tmp_path / "plot.png"],
                    [log, "--out", log], [table, "--csv", table]):
        line = run("-m", "paper.curves", *command, code=2).stderr.splitlines()[-1]
        assert "would be written over" in line, command
    assert sums(tmp_path) == before


def test_a_plot_that_nobody_named_replaces_its_own_alone(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "loss": 1.0}\n')
    (tmp_path / "catalog.jsonl").write_text('{"title": "no log"}\n')
    run("-m", "paper.curves", tmp_path)
    run("-m", "paper.curves", tmp_path)
    shutil.copyfile(PAGE, tmp_path / "plot.png")
    before = sums(tmp_path)
    line = run("-m", "paper.curves", tmp_path, code=2).stderr.splitlines()[-1]
    assert "plot.png: is not from this command" in line and sums(tmp_path) == before


@pytest.mark.parametrize("name", ["all.png", "all.html"])
def test_numbered_pictures_replace_nothing(page, name):
    """Nobody has named all-2."""
    taken = page.with_name(Path(name).stem + "-2" + Path(name).suffix)
    taken.write_text("mine")
    before = sums(page.parent)
    folder = page.parent / "two"
    folder.mkdir()
    for i in range(2):
        shutil.copyfile(page, folder / f"{i}.png")
    done = sample("--image", folder, "--explain", page.with_name(name), code=2)
    assert f"{taken}: is there already" in done.stderr.splitlines()[-1]
    assert {**sums(page.parent), **before} == sums(page.parent)
    taken.unlink()
    for _ in range(2):                      # our own are replaced
        sample("--image", folder, "--max-new-tokens", 1, "--explain", page.with_name(name))
    assert taken.stat().st_size > 1000


def test_a_link_stays_one_and_a_folder_is_no_picture(page):
    elsewhere = page.parent / "sub" / "page.html"
    link = page.with_name("link.html")
    link.symlink_to(elsewhere)
    sample("--image", page, "--max-new-tokens", 1, "--explain", link)
    assert link.is_symlink() and "</html>" in elsewhere.read_text()
    (page.parent / "sub.html").mkdir()
    line = sample("--image", page, "--explain", page.with_name("sub.html"), code=2).stderr
    assert "sub.html: a folder, not a file" in line.splitlines()[-1]
    line = sample("--image", page, "--explain", page.parent / "no" / "a.png", code=2).stderr
    assert "there is no folder" in line.splitlines()[-1]


def test_an_evaluation_leaves_files_alone_that_are_called_alike(tmp_path):
    ask = ["eval.py", "--benchmark", "toy=1", "--checkpoint", STAGE0, "--max-new-tokens", 2,
           "--out", tmp_path]
    for name in ("toy.ranking.csv", "toy.ranked.jsonl", "toy.rankings.md"):
        (tmp_path / name).write_text("mine")
    before = sums(tmp_path)
    run(*ask)
    run(*ask)
    assert before.items() <= sums(tmp_path).items()
    predictions = tmp_path / "toy.jsonl"
    assert predictions.exists()


def test_predictions_that_lack_some_are_not_scored(tmp_path):
    ask = ["eval.py", "--benchmark", "toy=3", "--checkpoint", STAGE0, "--max-new-tokens", 2,
           "--out", tmp_path]
    run(*ask)
    predictions = tmp_path / "toy.jsonl"
    predictions.write_text(predictions.read_text().splitlines(True)[0])
    scores = (tmp_path / "scores.json").read_text()
    line = run(*ask, code=2).stderr.splitlines()[-1]
    assert f"{predictions}: 1 of 3 predictions are left" in line
    assert (tmp_path / "scores.json").read_text() == scores


def test_somebody_elses_scores_and_lock_stay(tmp_path):
    predictions = tmp_path / "DocVQA.jsonl"
    predictions.write_text(json.dumps(PREDICTION) + "\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "scores.json").write_text('{"mathematics": 1}')
    before = sums(tmp_path)
    line = run("eval.py", "--score", predictions, "--out", other, code=2).stderr.splitlines()[-1]
    assert "scores.json: not as eval.py writes it" in line and sums(tmp_path) == before
    run("eval.py", "--score", predictions, "--out", tmp_path / "new")
    run("eval.py", "--score", predictions, "--out", tmp_path / "new")
    (other / "scores.json").unlink()
    (other / ".lock").write_text("precious")
    line = run("eval.py", "--benchmark", "toy=1", "--checkpoint", STAGE0, "--out", other,
               code=2).stderr.splitlines()[-1]
    assert ".lock: not this program's lock" in line
    assert (other / ".lock").read_text() == "precious"


def test_a_lesson_leaves_another_tokenizer_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_text("mine")
    command = ["-m", "reader.llm", "--out", tmp_path, "--threads", 1, "--workers", 0, "--steps", 0]
    line = run(*command, code=2).stderr.splitlines()[-1]
    assert "tokenizer.model: not the reader's tokenizer" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert (tmp_path / "tokenizer.model").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--lr=nan", "--threads=0", "--batch-size=0", "--log-every=0",
                                  "--workers=-1"])
def test_a_lessons_numbers_make_sense(tmp_path, flag):
    line = run("-m", "reader.encoder", "--out", tmp_path / "out", flag, code=2).stderr
    assert f"argument {flag.split('=')[0]}: " in line.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Folders of drawn pages


@pytest.mark.parametrize("name", ["questions.jsonl", "train.jsonl", "0001-receipt.png"])
@pytest.mark.parametrize("kind", ["file", "link", "broken link", "folder"])
def test_drawing_does_not_touch_what_is_not_drawn(tmp_path, name, kind):
    pages, elsewhere = tmp_path / "pages", tmp_path / "mine"
    pages.mkdir()
    path = pages / name
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link":
            elsewhere.write_text("mine")
        path.symlink_to(elsewhere)
    before = sums(tmp_path)
    done = run("-m", "toy.pages", "--draw", 3, "--train", pages, code=2)
    assert f"{path}: is not from this command" in done.stderr.splitlines()[-1]
    assert sums(tmp_path) == before and list(pages.iterdir()) == [path]


@pytest.mark.parametrize("module", ["toy.pages", "reader.pages"])
def test_drawn_pages_replace_their_own_and_nothing_else(tmp_path, module):
    draw = ["-m", module, "--draw", 2, tmp_path]
    run(*draw, "--seed", 1)
    first = sums(tmp_path)
    run(*draw, "--seed", 2)                 # other pages in their place
    second = sums(tmp_path)
    assert first != second and first.keys() <= second.keys()
    (tmp_path / "notes.txt").write_text("mine")
    run(*draw, "--seed", 1)
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write('{"image": "mine.png", "prompt": "?"}\n')
    before = sums(tmp_path)
    line = run(*draw, "--seed", 2, code=2).stderr.splitlines()[-1]
    assert "questions.jsonl: is not from this command, or was changed" in line
    assert sums(tmp_path) == before


def test_tesseracts_predictions_do_not_replace_a_models(tmp_path):
    (tmp_path / "reader-pages.jsonl").write_text("a model's")
    line = run("-m", "paper.tesseract", "reader-pages", "--out", tmp_path,
               code=2).stderr.splitlines()[-1]
    assert "reader-pages.jsonl: is not from this command" in line
    assert (tmp_path / "reader-pages.jsonl").read_text() == "a model's"


def test_hard_pages_do_not_replace_others(tmp_path, monkeypatch):
    (tmp_path / "questions.jsonl").write_text("mine")
    before = sums(tmp_path)
    monkeypatch.setattr("sys.argv", ["make.py", str(tmp_path)])
    monkeypatch.setattr(make, "FONT", "nowhere.ttf")
    with pytest.raises(InputError, match="^nowhere.ttf: is not installed: apt-get install"):
        make.main()
    monkeypatch.setattr(make, "letter", lambda text: Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="questions.jsonl: is not from this command"):
        make.main()
    assert sums(tmp_path) == before


def test_a_kill_between_two_files_leaves_a_folder_that_can_be_drawn_again(tmp_path):
    files = OwnFiles(tmp_path, ["a", "b"])
    files.write("a", b"one")
    files.write("b", b"one")
    replace = os.replace
    for name in "ab":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                OwnFiles(tmp_path, ["a", "b"]).write(name, b"two")
        assert os.replace is replace and (tmp_path / name).read_bytes() == b"one"
    OwnFiles(tmp_path, ["a", "b"]).write("a", b"three")
    (tmp_path / "b").write_bytes(b"changed")
    with pytest.raises(InputError, match="/b: is not from this command"):
        OwnFiles(tmp_path, ["a", "b"])
    OwnFiles(tmp_path, ["a"])
    assert (tmp_path / "b").read_bytes() == b"changed"


def test_what_would_no_longer_fit_goes(tmp_path):
    """train.jsonl says what stands on the pages that were drawn before. What is the user's own, or
    was changed, stays."""
    draw_pages(tmp_path, 3, 5, train=True)
    (tmp_path / "mine.txt").write_text("mine")
    before = sums(tmp_path)
    changed, lost = sorted(tmp_path.glob("000[12]-*.png"))
    changed.write_bytes(b"changed")
    draw_pages(tmp_path, 1, 6, train=False)
    after = sums(tmp_path)
    assert not (tmp_path / "train.jsonl").exists() and not lost.exists()
    assert changed.read_bytes() == b"changed" and (tmp_path / "mine.txt").read_text() == "mine"
    [page] = [json.loads(line)["image"] for line in (tmp_path / "questions.jsonl").open()]
    assert (tmp_path / page).exists() and before != after
