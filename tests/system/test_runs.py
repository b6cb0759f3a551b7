"""A run's folder is its own, what is not of the run is left alone, and who learns nothing fails."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import losses, run, start, torchrun
from plumbing import runs
from plumbing.files import MARKED, file_mark
from plumbing.settings import InputError
from shipped import PAGE


def train(out: Path, *more) -> list:
    return ["train.py", "--stage", 2, "--batch-size", 4, "--held-out", 0, "--out", out, *more]


@pytest.fixture
def out(stage1, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stage1").symlink_to(stage1)
    return tmp_path / "out"


def last_line(done) -> str:
    """The line by which train.py said no; no traceback before it."""
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("train.py: "))


def check_refused(process, out: Path) -> None:
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2, error
    line = rf"train.py: {out}: process \d+ on \S+ is at work in this folder: "
    assert re.search(line, error), error


def check_equal(folder: Path, alone: Path) -> None:
    assert losses(folder) == losses(alone)
    got, expected = (load_file(path / "model.safetensors") for path in (folder, alone))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_second_run_in_the_folder_ends_at_once_and_the_first_is_as_alone(stage1, out, tmp_path):
    """At five random moments of its run (before this was committed: at twenty)."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "stage1").symlink_to(stage1)
    command = ["--steps", 25, "--save-every", 2]
    run(*train(alone, *command))
    first = start(*train(out, *command))
    rng = random.Random(0)
    until = time.time() + 60
    while not (out / "stage2.partial" / "log.jsonl").exists():
        assert first.poll() is None and time.time() < until
        time.sleep(0.02)
    refused = 0
    for _ in range(5):
        time.sleep(rng.random())
        if first.poll() is not None:
            break
        check_refused(start(*train(out, *command)), out)
        refused += 1
    assert refused > 0
    assert first.communicate(timeout=120) and first.returncode == 0
    check_equal(out / "stage2", alone / "stage2")


def test_a_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    """NFS frees the lock of a machine that is gone after a while."""
    hold = ("import fcntl, os, sys, time\n"
            f"lock = os.open({str(tmp_path / '.lock')!r}, os.O_RDWR | os.O_CREAT)\n"
            "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
            "os.pwrite(lock, b'process 7 on node-b', 0)\n"
            "print('held', flush=True)\n"
            "time.sleep(float(sys.argv[1]))\n")
    for seconds, patience in (600, 1), (2, 60):
        monkeypatch.setattr(runs, "LEASE", timedelta(seconds=patience))
        holder = subprocess.Popen([sys.executable, "-c", hold, str(seconds)],
                                  stdout=subprocess.PIPE)
        assert holder.stdout.readline() == b"held\n"
        if patience < seconds:
            with pytest.raises(InputError, match="7 on node-b is at work.*if its machine is gone"):
                runs.claim(tmp_path)
        else:
            runs.claim(tmp_path)
            assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
        assert "process 7 on node-b is at work" in capsys.readouterr().err
        holder.kill()
        holder.wait()


def test_folders_of_the_users_that_are_called_alike_stay(out):
    """In a stage's folder, before it is complete and afterwards."""
    partial = out / "stage2.partial"
    (partial / "step-by-step").mkdir(parents=True)
    (partial / "step-by-step" / "notes.md").write_text("mine")
    (partial / "step-notes.partial").write_text("mine")
    (partial / "recipe.json").write_text("{}")
    for said in ("", "is complete"):
        assert said in run(*train(out, "--steps", 1)).stdout
        assert (out / "stage2" / "step-by-step" / "notes.md").read_text() == "mine"
        assert (out / "stage2" / "step-notes.partial").read_text() == "mine"
        assert not list((out / "stage2").glob("step-0*"))


def test_of_two_that_start_together_one_trains(stage1, out, tmp_path):
    """The lock goes with the process: after both, a third goes on."""
    pair = [start(*train(out, "--steps", 4)) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], errors
    assert len(losses(out / "stage2")) == 4
    assert "is complete" in run(*train(out, "--steps", 4)).stdout


def test_two_processes_of_one_run_share_the_folder(out):
    torchrun(2, *train(out, "--steps", 2))
    assert len(losses(out / "stage2")) == 2


@pytest.mark.parametrize("name", ["stage2", "stage2.partial"])
def test_a_folder_of_the_users_is_refused_before_the_training_and_stays(out, name):
    (out / name).mkdir()
    (out / name / "thesis.tex").write_text("years")
    line = last_line(run(*train(out, "--steps", 1), code=2))
    assert str(out / name) in line and "not a model's folder of ours" in line
    assert (out / name / "thesis.tex").read_text() == "years"
    assert not (out / "stage2.partial" / "log.jsonl").exists()


# --------------------------------------------------------------------------------------------------
# Data


def lines_of(n: int, **more) -> str:
    rows = [{"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": f"{i}!"}], **more} for i in range(n)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def grown(path: Path) -> None:
    path.write_text(path.read_text() + lines_of(1))


def shrunken(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def edited(path: Path) -> None:
    """Of the same size."""
    path.write_text(path.read_text().replace("say 3", "sag 3"))


def gone(path: Path) -> None:
    path.unlink()


def joined(path: Path) -> None:
    (path.parent / "more.jsonl").write_text(lines_of(3))


@pytest.mark.parametrize("change, named", [
    (grown, "a.jsonl"), (shrunken, "a.jsonl"), (edited, "a.jsonl"), (gone, "a.jsonl"),
    (joined, "more.jsonl")])
def test_data_that_changed_under_a_stopped_stage_is_named(out, tmp_path, change, named):
    """Put back, the stage goes on."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(lines_of(8))
    (data / "b.jsonl").write_text(lines_of(8))
    command = train(out, "--data", data, "--steps", 4)
    run(*command, "--max-steps", 2)
    shutil.copytree(data, tmp_path / "copy")
    change(data / "a.jsonl")
    line = last_line(run(*command, code=2))
    assert str(data / named) in line and "when the training state was written" in line
    assert (out / "stage2.partial" / "step-00000002").exists()
    shutil.rmtree(data)
    (tmp_path / "copy").rename(data)
    run(*command)
    assert len(losses(out / "stage2")) == 4


@pytest.mark.parametrize("rows, flags, why", [
    (lines_of(20, images=["gone.png"]), ["--steps", 3], "12 of 12 samples were bad"),
    (lines_of(20, images=["gone.png"]), ["--steps", 3, "--max-bad", 1], "learnt nothing: of its 3"),
    (lines_of(20, images=["gone.png"]), ["--epochs", 1], "20 of 20 samples were bad"),
    (lines_of(20), ["--steps", 2, "--lr-scale", "llm=0"], "learnt nothing: of its 2")])
def test_a_stage_that_learnt_nothing_has_failed(out, tmp_path, rows, flags, why):
    (tmp_path / "rows.jsonl").write_text(rows)
    command = train(out, "--data", tmp_path / "rows.jsonl", *flags)
    for _ in range(2):          # and it stays so
        assert why in last_line(run(*command, code=2))
    assert not (out / "stage2").exists()


def test_held_out_data_that_measures_nothing_is_said_before_the_first_step(out, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines_of(8))
    (tmp_path / "held.jsonl").write_text(lines_of(8, images=["gone.png"]))
    line = last_line(run(*train(out, "--data", tmp_path / "rows.jsonl", "--steps", 2,
                                "--eval-every", 1, "--eval-data", tmp_path / "held.jsonl"),
                         code=2))
    assert "held.jsonl" in line and "all of the first 8 samples" in line
    assert not (out / "stage2.partial" / "log.jsonl").exists()


def test_a_folder_that_is_read_may_be_the_runs_own(out, tmp_path):
    """Its files stay as they are: the stage's folder and the lock stand beside them."""
    for name in ("data.jsonl", "notes.txt"):
        (out / name).write_text(lines_of(8))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    run(*train(out, "--data", out / "data.jsonl", "--steps", 1))
    assert before == {path: path.read_bytes() for path in before}
    assert {path.name for path in out.iterdir()} == {
        ".lock", "data.jsonl", "notes.txt", "stage1", "stage2"}


def test_an_unreadable_file_is_bad_samples_and_can_be_gone_on_from(tmp_path):
    assert file_mark(tmp_path / "gone") == [0, 0]
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"ab")
    assert file_mark(tmp_path / "empty") == [0, 0] and file_mark(tmp_path / "short")[0] == 2


@pytest.mark.parametrize("place", [0, MARKED, 2 * MARKED, 5 * MARKED // 2, -1])
def test_a_file_is_known_again_by_its_start_its_middle_and_its_end(tmp_path, place):
    """Of three marks' length all of it."""
    path = tmp_path / "a.tar"
    content = bytearray(3 * MARKED)
    path.write_bytes(content)
    before = file_mark(path)
    content[place] = 1
    path.write_bytes(content)
    assert file_mark(path) != before and file_mark(path)[0] == before[0] == 3 * MARKED


def test_a_state_of_another_start_is_refused(tmp_path):
    """Its stage 1 was trained anew since; released weights have no id."""
    (tmp_path / "recipe.json").write_text('{"start": "a", "lr": 1}')
    for start in ("a", None):
        runs.check_recipe(tmp_path, {"start": start, "lr": 1})
    with pytest.raises(InputError, match="was trained with other weights to start from: take"):
        runs.check_recipe(tmp_path, {"start": "b", "lr": 1})


def test_a_stage_with_a_state_is_not_complete(tmp_path):
    """It was begun anew beside the older one."""
    (tmp_path / "stage2").mkdir()
    assert not runs.is_complete(2, tmp_path)
    (tmp_path / "stage2" / "config.json").write_text("{}")
    (tmp_path / "stage2.partial").mkdir()
    assert runs.is_complete(2, tmp_path)
    (tmp_path / "stage2.partial" / "step-00000004").mkdir()
    assert not runs.is_complete(2, tmp_path)


@pytest.mark.parametrize("command", [
    ["eval.py", "--benchmark", "toy=1", "--checkpoint"],
    ["sample.py", "--image", PAGE, "--checkpoint"]])
def test_a_model_that_is_not_there_leaves_nothing(tmp_path, command):
    folder = tmp_path / "no" / "such" / "model"
    done = run(*command, folder, code=2)
    assert str(folder) in done.stderr.splitlines()[-1] and not any(tmp_path.iterdir())
