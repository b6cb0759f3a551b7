"""Training whatever happens to it, and how it goes on: kills, stalls, a full disk, bad steps."""
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kill
from conftest import launcher, losses, rows, run, start, torchrun
from data import IGNORE, Tokenizer, pack_row
from model import AlignVLM
from toy.pages import ToyDocuments
from train import EVAL_SAMPLES


@pytest.fixture
def out(stage1, tmp_path):
    (tmp_path / "stage1").symlink_to(stage1)
    return tmp_path


def train(out: Path, *more) -> list:
    return ["train.py", "--stage", 2, "--steps", 12, "--batch-size", 4, "--save-every", 3,
            "--out", out, *more]


@pytest.fixture(scope="module")
def undisturbed(stage1, tmp_path_factory):
    """The losses of train() on two processes."""
    out = tmp_path_factory.mktemp("undisturbed")
    (out / "stage1").symlink_to(stage1)
    torchrun(2, *train(out))
    return losses(out / "stage2")


def wait_for(path: Path, process, seconds: float = 60) -> None:
    until = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < until, f"no {path}"
        time.sleep(0.02)


def resumed(folder: Path) -> list[int]:
    """The steps from which a stage went on."""
    return [row["resumed"] for row in rows(folder) if "resumed" in row]


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_killed_and_resumed_is_as_if_nothing_had_happened():
    """The short form of tests/helpers/kill.py: bit for bit."""
    assert kill.kill_and_compare(3, 1, 12, seed=4, start=start) > 0


def test_another_number_of_processes_goes_on(out, undisturbed):
    torchrun(2, *train(out, "--max-steps", 5))
    assert not (out / "stage2").exists()
    run(*train(out))
    assert resumed(out / "stage2") == [5]
    assert losses(out / "stage2") == pytest.approx(undisturbed, rel=1e-5)
    assert not states(out / "stage2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0(out, number):
    process = start(*train(out, "--steps", 400, "--save-every", 1000, "--workers", 1))
    log = out / "stage2.partial" / "log.jsonl"
    wait_for(log, process)
    while log.read_text().count("\n") < 2:
        time.sleep(0.05)
    os.killpg(process.pid, number)          # as a cluster does it: the loading processes get it too
    printed, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    [state] = (out / "stage2.partial").glob("step-*")
    step = json.loads((state / "progress.json").read_text())["step"]
    assert step == len(losses(out / "stage2.partial")) and str(state) in printed


def test_a_signal_saves_also_where_nobody_hears_it(out):
    """Ctrl-C in `train.py 2>&1 | tee log` ends tee first."""
    process = start(*train(out, "--steps", 400, "--save-every", 1000))
    log = out / "stage2.partial" / "log.jsonl"
    wait_for(log, process)
    process.stdout.close()
    process.stderr.close()
    while log.read_text().count("\n") < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    [state] = (out / "stage2.partial").glob("step-*")
    step = json.loads((state / "progress.json").read_text())["step"]
    assert step == len(losses(out / "stage2.partial"))


@pytest.mark.parametrize("progress", [
    "[]", '{"step": 3}', '{"step": 3, "position": {"x": 1}, "bad": {}}'])
def test_a_damaged_state_is_one_line_that_names_it(out, progress):
    run(*train(out, "--max-steps", 3))
    [state] = (out / "stage2.partial").glob("step-*")
    (state / "progress.json").write_text(progress)
    last = run(*train(out), code=2).stderr.splitlines()[-1]
    assert last.startswith("train.py: ") and str(state) in last
    assert (state / "progress.json").exists()


def test_torchrun_restarts_what_died(out, undisturbed):
    """Rank 1 dies in the step after the eighth; the state of six may still have been on its way to
    the disk."""
    run(*launcher(2), "--max-restarts", 1, "tests/helpers/struck.py", "KILL", 8, out / "struck",
        *train(out)[1:])
    assert (out / "struck").exists()
    assert resumed(out / "stage2") in ([3], [6])
    assert losses(out / "stage2") == undisturbed


def test_a_stalled_rank_is_named(out):
    process = start(*launcher(2), "tests/helpers/struck.py", "STOP", 3, out / "struck",
                    *train(out, "--timeout", 5)[1:])
    until = time.time() + 120
    while b"stalled or ended: " not in os.pread(process.stderr.fileno(), 10 ** 6, 0):
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.05)
    # Or torchrun waits 30 s before it kills.
    os.kill(int((out / "struck").read_text()), signal.SIGCONT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "rank 1 of 2 stalled or ended: " in error


def test_a_full_disk_keeps_the_last_good_state(out):
    """No file over 300 kB: the states have larger ones."""
    run(*train(out, "--max-steps", 4))
    limited = """if True:
        import resource, runpy
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        runpy.run_path("train.py", run_name="__main__")
    """
    done = run("-c", limited, *train(out)[1:], code=2)
    line = next(line for line in done.stderr.splitlines() if "train.py: " in line)
    assert "could not be written" in line and "step-00000004" in line, done.stderr
    assert states(out / "stage2.partial") == ["step-00000003", "step-00000004"]
    run(*train(out))
    assert resumed(out / "stage2") == [4, 4]
    assert len(losses(out / "stage2")) == 12


def test_no_room_and_no_permission_are_said_before_the_first_step(out):
    many_states = """if True:
        import plumbing.processes, plumbing.states, sys, train
        plumbing.states.KEPT = 10 ** 7
        sys.argv[0] = "train.py"
        plumbing.processes.run_main(train.main)
    """
    done = run("-c", many_states, *train(out)[1:], code=2)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: ") and "GB free" in last
    (out / "file").write_text("")
    below = out / "file" / "below"
    done = run("train.py", "--stage", 0, "--steps", 1, "--out", below, code=2)
    assert done.stderr.splitlines() == [f"train.py: --out {below}: Not a directory"]


def test_a_run_that_diverges_stops_and_names_its_samples(tmp_path):
    done = run("train.py", "--stage", 0, "--steps", 30, "--batch-size", 2, "--lr", "1e30",
               "--save-every", 1, "--out", tmp_path, code=2)
    line = done.stderr.splitlines()[-1]
    assert "--lr" in line and "toy/0/" in line and not (tmp_path / "stage0").exists()
    log = rows(tmp_path / "stage0.partial")
    assert [row["loss"] for row in log][-9:] == [None] * 9
    newest = states(tmp_path / "stage0.partial")[-1]
    assert int(newest[5:]) == log[-1]["step"] + 2 - 10, "a state was saved among the bad steps"


def test_a_bad_step_is_skipped_and_changes_nothing(stage1, tmp_path):
    """The same steps without the poisoned one's samples leave the same weights."""
    code = """if True:
        import train
        accumulate, calls = train.accumulate_gradients, []
        def poisoned(model, rows, device):
            loss, counts, losses = accumulate(model, rows, device)
            calls.append(loss)
            if len(calls) == 3 and POISON:
                next(model.parameters()).grad.fill_(float("inf"))
            elif len(calls) == 3:
                for p in model.parameters():
                    p.grad = None
                return None, counts, []
            return loss, counts, losses
        train.accumulate_gradients = poisoned
        train.main()
    """
    for poison in (True, False):
        out = tmp_path / str(poison)
        out.mkdir()
        (out / "stage1").symlink_to(stage1)
        run("-c", code.replace("POISON", str(poison)), *train(out, "--steps", 5)[1:])
    bad, good = (load_file(tmp_path / name / "stage2" / "model.safetensors")
                 for name in ("True", "False"))
    assert all(torch.equal(bad[name], good[name]) for name in good)
    log = rows(tmp_path / "True" / "stage2")
    assert [row["skipped"] for row in log] == [0, 0, 1, 1, 1]
    assert log[2]["loss"] is None and log[2]["grad_norm"] is None


def test_begun_anew_or_from_an_earlier_state_by_deleting(out):
    partial = out / "stage2.partial"
    run(*train(out, "--max-steps", 7))
    assert states(partial) == ["step-00000006", "step-00000007"]
    done = run(*train(out, "--lr", 0.5), code=2)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert line.startswith(f"train.py: {partial} was trained with lr") and "delete" in line
    run(*train(out, "--max-steps", 7))                  # done already
    assert states(partial) == ["step-00000006", "step-00000007"]
    shutil.rmtree(partial / "step-00000007")
    run(*train(out, "--max-steps", 8))
    assert resumed(partial)[-1] == 6
    shutil.rmtree(partial)
    run(*train(out))
    assert [row["step"] for row in rows(out / "stage2")] == list(range(12))


def test_parameters_that_never_get_a_gradient_resume_too(out, stage1):
    """With F from the layer before the last, the last one learns nothing."""
    (out / "stage1").unlink()
    shutil.copytree(stage1, out / "stage1")
    path = out / "stage1" / "config.json"
    config = json.loads(path.read_text())
    config["vision"]["feature_layer"] = -2
    path.write_text(json.dumps(config))
    run(*train(out, "--max-steps", 4))
    run(*train(out))
    assert len(losses(out / "stage2")) == 12


def test_held_out_scores_are_logged(out):
    run(*train(out, "--steps", 4, "--eval-every", 2, "--held-out", 5))
    scores = [row for row in rows(out / "stage2") if "held_out_loss" in row]
    assert [row["step"] for row in scores] == [1, 3]
    assert {"exact_match", "cer"} <= scores[0].keys()
    # The last one is of the model that was saved.
    model, tokenizer = AlignVLM.from_pretrained(out / "stage2"), Tokenizer(out / "stage2")
    pages = ToyDocuments(2, EVAL_SAMPLES, 0, tokenizer, model.config.vision, "held-out")
    samples = [pages[i] for i in range(EVAL_SAMPLES)]
    with torch.no_grad():
        total = sum(model(*pack_row([sample], model.config.vision)) for sample in samples)
    n = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    assert scores[1]["held_out_loss"] == pytest.approx(total.item() / n, rel=1e-4)
