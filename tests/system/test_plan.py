"""The plan's arithmetic against what really runs, and what is drawn of a log."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, run, torchrun
from model import ALIGNVLM_PRESETS, AlignVLM
from paper.curves import read_curves
from paper.plan import cpu_memory
from plumbing.logs import read_log

def plan(*options, code: int = 0):
    return run("-m", "paper.plan", *options, code=code)


@pytest.mark.parametrize("preset", ["toy", "short"])
def test_memory_is_what_a_real_step_has(preset):
    """Two processes: parameters, gradients, optimizer and connector within 10 %. By hand:
    tests/helpers/measure.py mid."""
    done = torchrun(2, ROOT / "tests" / "helpers" / "measure.py", preset)
    for name, (measured, planned) in json.loads(done.stdout.splitlines()[-1]).items():
        assert planned == pytest.approx(measured, rel=0.1), name


@pytest.mark.parametrize("preset, gpus, memory, answer", [
    ("llama-3.2-1b", 64, 80, "as asked: "), ("llama-3.1-8b", 64, 80, "--recompute"),
    ("llama-3.2-1b", 1, 24, "--offload"), ("llama-3.1-8b", 1, 24, "nothing fits")])
def test_the_plan_says_what_fits(preset, gpus, memory, answer):
    done = plan("--preset", preset, "--stage", 2, "--gpus", gpus, "--gpu-memory", memory)
    fitting = [line for line in done.stdout.splitlines()
               if "which fits" in line or "nothing" in line]
    assert len(fitting) == 1 and answer in fitting[0] and "FLOPs a step" in done.stdout


def test_the_plan_follows_the_recipe_that_the_flags_make():
    done = plan("--stage", 1, "--lr-scale", "vision=0", "llm=0", "--epochs", 3,
                "--batch-size", 100)
    assert "connector trained, 100 samples" in done.stdout
    assert f"{3 * 81_000:,} steps" in done.stdout and " + connector" not in done.stdout


def test_a_step_takes_as_long_as_its_flops_on_all_gpus():
    """Four H100s at a quarter of their peak are one at its peak: 989 TFLOP/s. The low-resource data
    has five tiles a page, where as many may be, and 779 K samples."""
    common = "--preset", "low-resource", "--stage", 2, "--gpus", 4, "--mfu", 0.25
    done = plan(*common)
    assert "each of 5 tiles and 384 tokens of text" in done.stdout
    found = re.search(r"(\S+) FLOPs a step, (\S+) s at 25% .*; (\S+) steps in (\S+) hours",
                      done.stdout)
    flops, seconds, steps, hours = (float(text.replace(",", "")) for text in found.groups())
    assert steps == math.ceil(779_000 / 128)
    assert seconds == pytest.approx(flops / 989e12, rel=0.01)
    assert hours == pytest.approx(steps * seconds / 3600, rel=0.06)
    for most, tiles in (1, 1), (2, 3):      # of several tiles the whole page is one more
        assert f"each of {tiles} tiles" in plan(*common, "--max-tiles", most).stdout


@pytest.mark.parametrize("trained", [("connector",), ("vision", "connector", "llm")])
def test_the_cpus_memory_is_that_of_a_copy_of_weights_and_moments(trained):
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    parameters = [p for name in trained for p in getattr(model, name).parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    held = sum(x.nbytes for x in [*model.parameters(), *moments])
    assert cpu_memory(model.config, trained, 1, offload=False) == held


@pytest.mark.parametrize("flags", [
    ["--preset", "low-resource", "--stage", 3], ["--stage", 0], ["--gpus", 64, "--shard-size", 7],
    ["--gpus", 0], ["--gpus", "9" * 401], ["--mfu", "nan"], ["--mfu", 40],
    ["--lr-scale", "vision"]])
def test_impossible_plans_are_one_line(flags):
    done = plan(*flags, code=2)
    assert "Traceback" not in done.stderr and done.stdout == ""


def write_log(folder: Path) -> Path:
    """Twenty steps, of which the last five were done twice, and a held-out loss between."""
    steps = [{"step": i, "loss": 5 - i / 10, "tokens_per_s": 100 + i} for i in range(20)]
    steps[4]["loss"] = None
    again = [{**row, "loss": 1.0} for row in steps[15:]]
    lines = [*steps, {"step": 19, "held_out_loss": 4.0}, {"resumed": 15, "processes": 2}, *again]
    folder.mkdir(parents=True)
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def test_plot_draws_joined_logs(tmp_path):
    a, b = (write_log(tmp_path / name / "stage1") for name in ("a", "b"))
    assert [row["loss"] for row in read_log(a)][13:] == [3.7, 3.6] + [1.0] * 5
    picture = tmp_path / "plot" / "plot.png"
    done = run("-m", "paper.curves", tmp_path / "a", b, "--out", picture)
    assert Image.open(picture).size[0] > 500 and "2 curves" in done.stdout
    (tmp_path / "other.jsonl").write_text('{"step": 1, "loss": 2.0}')     # of another program
    run("-m", "paper.curves", tmp_path / "other.jsonl", "--out", picture)
    for bad, text in [("bad.jsonl", "{\n}"), ("bad.csv", "{\n}"), ("a.jsonl", '{"step": "a"}'),
                      ("b.jsonl", '{"step": 1, "loss": "2"}'),
                      ("b.csv", "curve,step,loss,held_out_loss,lr,tokens_per_s\na,,1,,,\n")]:
        (tmp_path / bad).write_text(text)
        [line] = run("-m", "paper.curves", tmp_path / bad, code=2).stderr.splitlines()
        assert bad in line


def test_a_log_that_ends_where_it_was_resumed_has_the_steps_before(tmp_path):
    """Killed again at once: what was done from there on is lost."""
    lines = [*({"step": i, "loss": 1.0} for i in range(6)), {"step": 5, "held_out_loss": 2.0},
             {"resumed": 4, "processes": 1}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def test_a_picture_takes_the_name_that_it_was_given(tmp_path):
    """Whatever the name and those of the runs: no mathematics, no other format, none lost."""
    log = write_log(tmp_path / r"$\frac$")
    run("-m", "paper.curves", log, "--out", tmp_path / "picture")
    assert Image.open(tmp_path / "picture").format == "PNG"
    assert not list(tmp_path.glob("picture?*"))
    steps = [{"step": 100_000 + i, "loss": 1.0} for i in range(3)]
    log.write_text("".join(json.dumps(row) + "\n" for row in steps))
    run("-m", "paper.curves", log, "--csv", tmp_path / "a.csv")
    [rows] = read_curves(tmp_path / "a.csv").values()
    assert [row["step"] for row in rows] == [100_000, 100_001, 100_002]
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text())
    done = run("-m", "paper.curves", tmp_path / "a.csv", tmp_path / "b.csv", "--out",
               tmp_path / "both.png", code=2)
    assert "has the name of an earlier one" in done.stderr and not (tmp_path / "both.png").exists()


def test_a_thinned_table_has_the_means_of_the_steps(tmp_path):
    """A short log stays as it is. A table is drawn as a log is."""
    log, table = write_log(tmp_path / "a"), tmp_path / "a.csv"
    run("-m", "paper.curves", log, "--csv", table)
    [rows] = read_curves(table).values()
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_log(log)]
    run("-m", "paper.curves", table)
    assert Image.open(tmp_path / "plot.png").size[0] > 500

    steps = [{"step": i, "loss": float(i)} for i in range(1000)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    run("-m", "paper.curves", tmp_path / "long.jsonl", "--csv", table)
    [rows] = read_curves(table).values()
    assert len(rows) == 200 and [rows[0]["step"], rows[0]["loss"]] == [4, 2]
    assert [rows[-1]["step"], rows[-1]["loss"]] == [999, 997]


def test_the_curve_of_the_toys_stage_0_is_there():
    [rows] = read_curves(ROOT / "toy" / "curve.csv").values()
    losses = [row["loss"] for row in rows]
    assert 100 < len(rows) <= 200 and all(loss > 0 for loss in losses)
