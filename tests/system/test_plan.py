"""The plan's arithmetic against what really runs, and what is drawn of a log."""
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, run, torchrun
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig
from paper.curves import read_curves
from paper.plan import step_flops
from plumbing.logs import read_log
from vision import SigLIPConfig

ODD = AlignVLMConfig(
    SigLIPConfig(48, 3, 4, 80, 32, 8, 1e-6),
    LlamaConfig(vocab_size=331, hidden_size=36, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10,
                intermediate_size=52, rope_factor=1.0, tie_embeddings=False))


def plan(*options, code: int = 0):
    return run("-m", "paper.plan", *options, code=code)


@pytest.mark.parametrize("preset", ["toy", "short"])
def test_memory_is_what_a_real_step_has(preset):
    """Two processes: parameters, gradients, optimizer and connector within 10 %. By hand:
    tests/helpers/measure.py mid."""
    done = torchrun(2, ROOT / "tests" / "helpers" / "measure.py", preset)
    for name, (measured, planned) in json.loads(done.stdout.splitlines()[-1]).items():
        assert planned == pytest.approx(measured, rel=0.1), name


@pytest.mark.parametrize("config", [ALIGNVLM_PRESETS["toy"], ODD], ids=["toy", "odd"])
@pytest.mark.parametrize("trainable", [("vision", "connector", "llm"), ("connector", "llm"),
                                       ("connector",)])
def test_flops_are_what_torch_counts(config, trainable, monkeypatch):
    """Without attention's own products, which torch's counter does not know on a CPU, and with the
    connector written as the equations: what is computed a second time is not the model's."""
    model = AlignVLM(config)
    for name, module in model.named_children():
        module.requires_grad_(name in trainable)
    connector = model.connector
    monkeypatch.setattr(connector, "forward", lambda F, E_text: connector.p_vocab(F) @ E_text)
    v = config.vision
    tokens = torch.cat([torch.full((2 * v.n_patches,), IMAGE), torch.arange(50)])[None]     # (1, L)
    labels = torch.full_like(tokens, -100)
    labels[0, -20:] = 7
    pixels = torch.randn(2, 3, v.image_size, v.image_size)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels, pixels, [tokens.shape[1]]).backward()
    operations = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in operations.items() if "attention" not in str(op))
    counts = Counter(tokens=tokens.shape[1], supervised=20, tiles=2)
    passes = 3 if "vision" in trainable else 1      # forward alone, or backward too
    attention = passes * 4 * 2 * v.n_patches ** 2 * v.hidden_size * v.n_layers
    planned = step_flops(config, trainable, counts)
    assert planned - attention == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("preset, gpus, memory, answer", [
    ("llama-3.2-1b", 64, 80, "as asked: "), ("llama-3.1-8b", 64, 80, "--recompute"),
    ("llama-3.1-8b", 1, 24, "nothing fits")])
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


@pytest.mark.parametrize("flags", [
    ["--preset", "low-resource", "--stage", 3], ["--stage", 0], ["--gpus", 64, "--shard-size", 7],
    ["--gpus", 0], ["--mfu", "nan"], ["--lr-scale", "vision"]])
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
    for bad in ("bad.jsonl", "bad.csv"):
        (tmp_path / bad).write_text("{\n}")
        assert bad in run("-m", "paper.curves", tmp_path / bad, code=2).stderr


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


def test_the_shipped_models_curves_are_there():
    curves = read_curves(ROOT / "toy" / "curve.csv")
    assert {name[:6] for name in curves} == {"stage0", "stage1", "stage2", "stage3"}
    for rows in curves.values():
        losses = [row["loss"] for row in rows]
        assert 100 < len(rows) <= 201 and all(loss > 0 for loss in losses)
