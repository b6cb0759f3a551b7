"""The plan's arithmetic against what really runs, and what is drawn of a log."""
import json
from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, run, torchrun
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig
from paper.plan import step_flops
from plumbing.logs import read_log
from vision import SigLIPConfig

ODD = AlignVLMConfig(SigLIPConfig(48, 3, 4, 80, 32, 8, 1e-6),
                     LlamaConfig(vocab_size=331, hidden_size=36, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10,
                                 intermediate_size=52, rope_factor=1.0, tie_embeddings=False))


@pytest.mark.parametrize("preset", ["toy", "short"])
def test_memory_is_what_a_real_step_has(preset):
    """Two processes: parameters, gradients, optimizer and connector within 10 %. By hand: tests/helpers/measure.py mid."""
    done = torchrun(2, ROOT / "tests" / "helpers" / "measure.py", preset)
    for name, (measured, planned) in json.loads(done.stdout.splitlines()[-1]).items():
        assert planned == pytest.approx(measured, rel=0.1), name


@pytest.mark.parametrize("config", [ALIGNVLM_PRESETS["toy"], ODD], ids=["toy", "odd"])
@pytest.mark.parametrize("trainable", [("vision", "connector", "llm"), ("connector", "llm"), ("connector",)])
def test_flops_are_what_torch_counts(config, trainable, monkeypatch):
    """Without attention's own products, which torch's counter does not know on a CPU, and with the connector written
    as the equations: what is computed a second time is not the model's."""
    model = AlignVLM(config)
    for name, module in model.named_children():
        module.requires_grad_(name in trainable)
    monkeypatch.setattr(model.connector, "forward", lambda F, E_text: model.connector.p_vocab(F) @ E_text)
    v = config.vision
    tokens = torch.cat([torch.full((2 * v.n_patches,), IMAGE), torch.arange(50)])[None]
    labels = torch.full_like(tokens, -100)
    labels[0, -20:] = 7
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)      # nor oneDNN's products
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels, torch.randn(2, 3, v.image_size, v.image_size), [tokens.shape[1]]).backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    counts = Counter(tokens=tokens.shape[1], supervised=20, tiles=2)
    attention = 4 * 2 * v.n_patches * v.n_patches * v.hidden_size * v.n_layers * (3 if "vision" in trainable else 1)
    assert step_flops(config, trainable, counts) - attention == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("preset, gpus, memory, answer", [
    ("llama-3.2-1b", 64, 80, "as asked: "), ("llama-3.1-8b", 64, 80, "--recompute"), ("llama-3.1-8b", 1, 24, "nothing fits")])
def test_the_plan_says_what_fits(preset, gpus, memory, answer):
    done = run("train.py", "--plan", "--preset", preset, "--stage", 2, "--gpus", gpus, "--gpu-memory", memory)
    fitting = [line for line in done.stdout.splitlines() if "which fits" in line or "nothing" in line]
    assert len(fitting) == 1 and answer in fitting[0] and "FLOPs a step" in done.stdout


def test_the_plan_follows_the_recipe_that_the_flags_make():
    done = run("train.py", "--plan", "--stage", 1, "--lr-scale", "vision=0", "llm=0", "--epochs", 3, "--batch-size", 100)
    assert "connector trained, 100 samples" in done.stdout and f"{3 * 81_000:,} steps" in done.stdout
    assert " + connector" not in done.stdout


def test_plot_draws_joined_logs(tmp_path):
    rows = [{"step": i, "loss": 5 - i / 10 if i != 4 else None, "tokens_per_s": 100 + i} for i in range(20)]
    again = [{"resumed": 15, "processes": 2}, *({**row, "loss": 1.0} for row in rows[15:])]
    for name in ("a", "b"):
        (tmp_path / name / "stage1").mkdir(parents=True)
        (tmp_path / name / "stage1" / "log.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 19, "held_out_loss": 4.0}, *again]))
    assert [row["loss"] for row in read_log(tmp_path / "a" / "stage1" / "log.jsonl")][13:] == [3.7, 3.6] + [1.0] * 5
    done = run("train.py", "--plot", tmp_path / "a", tmp_path / "b" / "stage1" / "log.jsonl", "--out", tmp_path / "plot")
    assert Image.open(tmp_path / "plot" / "plot.png").size[0] > 500 and "2 logs" in done.stdout
    (tmp_path / "other.jsonl").write_text('{"step": 1, "loss": 2.0}')     # a log of another program's
    run("train.py", "--plot", tmp_path / "other.jsonl", "--out", tmp_path / "plot")
    (tmp_path / "bad.jsonl").write_text("{")
    assert "bad.jsonl" in run("train.py", "--plot", tmp_path / "bad.jsonl", code=2).stderr
