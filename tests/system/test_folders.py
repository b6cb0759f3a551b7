"""plumbing/folders.py: which files of a folder are data, held-out data, images, or foreign."""
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conftest import ROOT
from data import Sample
from plumbing.folders import data_files, held_out_kind, image_files, is_foreign
from plumbing.settings import InputError
from plumbing.streams import Documents, full_spec
from sets import (PAGES, add_member, encoded, messages, no_hang, outcome,  # noqa: F401
                  tokenizer, write_lines, write_texts)

TRAINING = ["train.jsonl", "train_val.jsonl", "trainval.jsonl", "data.jsonl", "contest.jsonl",
            "DocVQA.jsonl", "latest.jsonl", "evalanche.jsonl", "devices.jsonl", "Train-Test.jsonl",
            "part0.jsonl"]
HELD_OUT = ["val.jsonl", "docvqa_val.jsonl", "DocVQA-validation.jsonl", "DocVQAVal.jsonl",
            "VALIDATION.jsonl", "dev2.jsonl", "a.dev.jsonl", "val/part0.jsonl", "Eval/a.jsonl",
            "held-out.jsonl", "held_out_val.jsonl"]
TESTED = ["Test.jsonl", "test-00000.jsonl", "docvqaTest.jsonl", "TESTING/a.jsonl"]
FOREIGN = ["._train.jsonl", ".train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl",
           "__MACOSX/train.jsonl", "__MACOSX/._train.jsonl", "@eaDir/train.jsonl"]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_texts((folder / name).parent, Path(name).stem, 3)


def names_of(folder: Path, **options) -> list[str]:
    root, files = data_files(str(folder), **options)
    return sorted(str(file.relative_to(root)) for file in files)


@pytest.fixture
def folder(tmp_path):
    """One whose own name says nothing; tmp_path's is the test's."""
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("name", TRAINING)
def test_training_data_by_name(name):
    assert held_out_kind(name) is None and not is_foreign(name)


@pytest.mark.parametrize("name", HELD_OUT + TESTED)
def test_held_out_data_by_name(folder, name):
    """It is not trained on beside others, nor alone; evaluation takes it."""
    assert held_out_kind(name) == (1 if name in TESTED else 0)
    put(folder, name)
    with pytest.raises(InputError, match="only held-out data there, by their names .*name a file"):
        data_files(str(folder))
    assert names_of(folder, held_out=True) == [name]
    put(folder, "train.jsonl")
    assert names_of(folder) == ["train.jsonl"]
    assert names_of(folder, held_out=True) == [name]
    assert data_files(str(folder / name))[1] == [folder / name]      # named itself


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_no_data(folder, name):
    put(folder, name)
    (folder / name).write_bytes(b"\0\5\x16\7\0\2")
    for held_out in (False, True):
        with pytest.raises(InputError, match="no .tar, .parquet, .jsonl or .json"):
            data_files(str(folder), held_out)
    put(folder, "data.jsonl")
    assert names_of(folder) == ["data.jsonl"]


def test_evaluation_takes_the_validation_split_first(folder):
    put(folder, "train.jsonl", "test.jsonl")
    assert names_of(folder, held_out=True) == ["test.jsonl"]
    put(folder, "val.jsonl")
    assert names_of(folder, held_out=True) == ["val.jsonl"]
    put(folder / "dev", "a.jsonl", "b.jsonl", "train.jsonl")
    assert names_of(folder / "dev", held_out=True) == ["a.jsonl", "b.jsonl"]


def test_evaluation_never_takes_training_data(folder):
    put(folder, "train.jsonl", "more.jsonl")
    with pytest.raises(InputError, match="nothing there is called val, dev or test"):
        Documents([str(folder)], 0, lambda example: example, held_out=True)


def test_evaluation_takes_held_out_data_also_of_sets_with_weights(folder):
    put(folder, "a/train.jsonl", "a/val.jsonl", "b/train.jsonl", "b/val.jsonl")
    for held_out, name in (False, "train.jsonl"), (True, "val.jsonl"):
        specs = [f"{folder / 'a'}:2", str(folder / "b")]
        sets = Documents(specs, 0, None, held_out=held_out).sets
        assert [[file.name for _, file, _ in data_set.files] for data_set in sets] == [[name]] * 2


def test_images_of_a_folder(tmp_path):
    """Foreign files and what is no image are left out, whatever Pillow can open."""
    for name in ["b.PNG", "a.jpg", "c.tif", "d.pdf", "._a.jpg", ".hidden.png", "a.h5", "a.mpg",
                 "a.eps", "Thumbs.db", "notes.txt", "a.grib"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.tif", "d.pdf"]


def test_foreign_members_of_a_tar(tmp_path, tokenizer):
    """As macOS writes them: beside each member one with the same name after `._`."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "./._.", b"\0\5\x16\7")
        add_member(tar, "./.DS_Store", b"\0")
        for i in range(3):
            for name, content in [(f"{i}.jpg", encoded(PAGES[i][0], "JPEG")), (f"{i}.txt", b"yes")]:
                add_member(tar, f"./._{name}", b"\0\5\x16\7\0\2")
                add_member(tar, f"./{name}", content)
                add_member(tar, f"__MACOSX/._{name}", b"\0\5\x16\7\0\2")
    items = outcome(tmp_path, tokenizer)
    assert len(items) == 3 and all(isinstance(item, Sample) for item in items)


@pytest.mark.parametrize("linked", [True, False])
def test_absolute_names_through_a_link(tmp_path, tokenizer, linked):
    """As /tmp of macOS, which is /private/tmp: either of them may name the images."""
    real, link = tmp_path / "private", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    PAGES[0][0].save(real / "page.png")
    PAGES[0][0].save(tmp_path / "outside.png")
    named, opened = (real, link) if linked else (link, real)
    rows = [{"messages": messages(("?", "!")), "images": [name]}
            for name in (f"{named}/page.png", f"{tmp_path}/outside.png", f"{named}/../outside.png")]
    write_lines(real / "train.jsonl", rows)
    first, *others = outcome(opened, tokenizer)
    assert isinstance(first, Sample)
    assert [bad.kind for bad in others] == ["image outside the folder"] * 2


@pytest.mark.parametrize("name", ["at_10:30", "a:1", "a:0", "b:2.5"])
def test_a_colon_in_a_path_is_no_weight(tmp_path, name):
    put(tmp_path / name, "train.jsonl")
    for spec in (name, f"{name}/*.jsonl", f"{name}/train.jsonl"):
        documents = Documents([f"{tmp_path}/{spec}"], 0, lambda example: example)
        assert documents.weights == [1.0] and documents.epoch_samples() == 3
    assert Documents([f"{tmp_path}/{name}:3"], 0, lambda example: example).weights == [3.0]


def test_one_path_written_in_two_ways_is_one(tmp_path, monkeypatch):
    """What a run is resumed with: `r/` for `r`, a relative path, a link."""
    put(tmp_path / "r", "train.jsonl")
    (tmp_path / "link").symlink_to("r")
    monkeypatch.chdir(tmp_path)
    named = f"{os.path.realpath(tmp_path)}/r"
    for path in ("r", "r/", "./r", str(tmp_path / "r"), "link"):
        assert full_spec(path) == named and full_spec(f"{path}:2.0") == f"{named}:2"
    assert full_spec("r:1") != full_spec("r")       # a data set of its own


# Says what becomes of each path for somebody without rights.
FORBIDDEN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from plumbing.folders import data_files, image_files
from plumbing.images import read_image
from plumbing.settings import InputError
from plumbing.streams import DataSet
from pathlib import Path
folder = sys.argv[2]
if os.getuid() == 0:
    os.setuid(65534)
for act in (lambda: read_image(f"{folder}/a.png"), lambda: DataSet([f"{folder}/a.jsonl"], 0),
            lambda: DataSet([folder], 0), lambda: data_files(f"{folder}/closed"),
            lambda: image_files(Path(f"{folder}/closed")),
            lambda: data_files(f"{folder}/closed/a.jsonl")):
    try:
        act()
        print("read")
    except InputError as error:
        print(error)
"""


def test_what_may_not_be_read_says_so(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    for path in (tmp_path / "a.png", tmp_path / "a.jsonl"):
        path.write_bytes(b"{}")
        path.chmod(0)
    closed.chmod(0)
    for parent in [tmp_path, *tmp_path.parents][:4]:        # pytest's own are private
        if os.stat(parent).st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", FORBIDDEN, str(ROOT), str(tmp_path)],
                          capture_output=True, text=True)
    closed.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(line.endswith("it may not be read (permission denied)") for line in lines), lines
