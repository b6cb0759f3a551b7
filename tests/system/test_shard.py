"""train.shard: what is compiled, what is calculated in bf16, and who finds no GPU."""
import functools
import json
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conftest import HELPERS, close, rows, run, torchrun
from data import Sample, pack_row
from model import IGNORE
from paper.recipes import RECIPES
from plumbing.logs import Step, StepLog, mfu, suspects_of
from plumbing.states import States
from small_models import (SAMPLES, VISION, gradients_of, in_bytes, labelled, row_of,
                          small_vlm)
from train import match_ranks, optimizer_of, shard, take_step

CPU = torch.device("cpu")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch) -> list:
    """What torch.compile makes of a model, to run as it is: without a compiler of machine code."""
    made = []

    def aot_eager(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=aot_eager))
    return made


def loss_and_gradients(vlm: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of two different rows, one after the other. The model's gradients are whole."""
    loss = sum(vlm(*row_of(samples)) for samples in (SAMPLES, SAMPLES[1:4]))
    loss.backward()
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g
                 for name, g in gradients_of(vlm).items()}
    return loss.detach(), gradients


def test_compiled_blocks_are_graphs_recomputed_ones_too(one_process, graphs):
    """As many and with the same gradients: the compiler does not enter what checkpoint wraps."""
    loss, gradients = loss_and_gradients(small_vlm())
    made = []
    for recompute in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        vlm = small_vlm()
        shard(vlm, CPU, recompute=recompute, compile=True)
        our_loss, ours = loss_and_gradients(vlm)
        made.append(len(graphs))
        close(our_loss, loss)
        for name, gradient in gradients.items():
            weight = gradients[name.replace("k_proj.bias", "k_proj.weight")]
            close(ours[name], gradient, scale=weight.abs().max().item())
    assert made[0] == made[1] >= 2          # a block of either tower at least


def test_a_recomputed_block_runs_twice(one_process):
    for recompute, times in (False, 1), (True, 2):
        vlm, ran = small_vlm(), []
        vlm.llm.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: ran.append(1))
        shard(vlm, CPU, recompute=recompute)
        vlm(*row_of(SAMPLES)).backward()
        assert len(ran) == times


def test_a_step_is_adamw_on_the_mean_over_supervised_tokens(one_process):
    """Three steps of two rows, written out: the loss, the clipped gradient, the modules' shares of
    the rate, weight decay on matrices alone."""
    shares = {"vision": 0.2, "llm": 3.0}
    recipe = replace(RECIPES["toy"][2], lr_scale=shares, weight_decay=0.5)
    lr, clip = 1e-2, 1e-3
    rows = [[Sample(tokens, labelled(tokens), *in_bytes(pixels), "") for tokens, pixels in some]
            for some in (SAMPLES[:3], SAMPLES[3:])]
    n = sum(int((sample.labels != IGNORE).sum()) for row in rows for sample in row)
    plain, ours = small_vlm(), small_vlm()
    groups = [{"params": [p], "lr": lr * shares.get(name.split(".")[0], 1.0),
               "weight_decay": 0.5 if p.ndim > 1 else 0.0}
              for name, p in plain.named_parameters()]
    theirs = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps)
    shard(ours, CPU)
    optimizer = optimizer_of(ours, recipe)
    for _ in range(3):
        theirs.zero_grad()
        loss = sum(plain(*pack_row(row, VISION)) for row in rows) / n
        loss.backward()
        norm = sum(p.grad.square().sum() for p in plain.parameters()).sqrt()
        assert norm > clip
        for p in plain.parameters():
            p.grad *= clip / norm
        theirs.step()
        numbers, _, _ = take_step(ours, optimizer, rows, lr, clip, CPU)
        close(numbers[:2], torch.stack([loss.detach(), norm]))
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        close(mine.full_tensor().detach(), other.detach())


def test_moments_that_are_there_from_the_start_change_no_step(one_process, tmp_path):
    """States makes them before the first step, which is Adam's first one all the same."""
    row = [Sample(tokens, labelled(tokens), *in_bytes(pixels), "") for tokens, pixels in SAMPLES]
    found = []
    for has_states in (False, True):
        vlm = small_vlm()
        shard(vlm, CPU)
        optimizer = optimizer_of(vlm, RECIPES["toy"][2])
        if has_states:
            States(tmp_path, vlm, optimizer, timedelta(minutes=1))
        for _ in range(2):
            take_step(vlm, optimizer, [row], 1e-2, 1.0, CPU)
        found.append([p.full_tensor().detach() for p in vlm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_line_of_the_log_says_what_a_step_had(one_process, tmp_path):
    counts = Counter(tokens=60, blank=20, images=3)
    flops = lambda counts: 1e3 * counts["tokens"]
    with StepLog(tmp_path / "log.jsonl", 2, 5, 9, 0, CPU, flops) as log:
        log.add(Step({"step": 5, "lr": 1e-3}, counts, [["a"]], torch.tensor([1.5, 2.0, 3.0]), None))
    [line] = rows(tmp_path)
    assert (line["stage"], line["step"], line["loss"], line["grad_norm"]) == (2, 5, 1.5, 2.0)
    assert line["padding"] == 20 / 80
    assert line["images_per_s"] / line["tokens_per_s"] == pytest.approx(3 / 60)
    assert line["flops_per_s"] / line["tokens_per_s"] == pytest.approx(1e3)


def test_the_samples_of_bad_rows_are_suspects_or_all():
    keys, nan = [["a", "b"], ["c"], ["d"]], float("nan")
    assert suspects_of(keys, [1.0, nan, float("inf")]) == ["c", "d"]
    assert suspects_of(keys, [1.0, 2.0, 3.0]) == ["a", "b", "c", "d"]       # the gradient was bad


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA L40", None)])
def test_a_gpu_is_measured_by_its_own_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    share = mfu(1e14, torch.device("cuda"))
    assert share == (pytest.approx(1e14 / peak) if peak else "unknown")
    assert mfu(1e14, CPU) == "unknown"


def test_a_step_counts_what_all_rows_hold(one_process):
    """A row of text alone gets a blank tile beside one with images: that counts as blank only."""
    samples = [Sample(tokens, labelled(tokens), *in_bytes(pixels), "", n_images)
               for (tokens, pixels), n_images in zip(SAMPLES, [1, 0, 2, 0])]
    matched, counts = match_ranks([samples[:3], samples[3:]], small_vlm().config)
    lengths = [len(sample.tokens) for sample in samples]
    supervised = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    assert counts == {"tokens": sum(lengths), "supervised": supervised, "blank": 4, "tiles": 4,
                      "images": 3, "squares": sum(n * n for n in lengths)}
    assert [len(row) for row in matched] == [3, 2]


def test_offloaded_steps_are_the_same(one_process):
    """On a CPU, where all is in its memory anyway: the way there and back changes nothing."""
    found = []
    for offload in (False, True):
        vlm = small_vlm()
        shard(vlm, CPU, offload=offload)
        optimizer = optimizer_of(vlm, RECIPES["toy"][2])
        rows = [[Sample(tokens, labelled(tokens), *in_bytes(pixels), "")]
                for tokens, pixels in SAMPLES]
        numbers = [take_step(vlm, optimizer, rows, 1e-2, 1.0, CPU)[0] for _ in range(3)]
        found.append([*numbers, *(p.full_tensor().detach() for p in vlm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][2])


def test_two_processes_in_bf16_are_one_within_its_rounding(tmp_path):
    """And groups of copies wait no longer for each other than all wait for all."""
    command = HELPERS / "bf16_gradients.py"
    one = json.loads(run(command, tmp_path / "one").stdout.splitlines()[-1])
    two = json.loads(torchrun(2, command, tmp_path / "two").stdout.splitlines()[-1])
    assert two[0] == pytest.approx(one[0], rel=2 ** -8) and two[1] == [77, 77]
    expected, gradients = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        weight = expected[name.replace("k_proj.bias", "k_proj.weight")]
        close(gradients[name], gradient, 2 ** -8, scale=weight.abs().max().item())


def test_a_process_without_a_gpu_of_its_own_is_one_line(tmp_path):
    """Two processes on a machine with one GPU, which this test invents."""
    program = ("import os, torch; os.environ['LOCAL_RANK'] = '1'; "
               "torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1; "
               "import train; train.run_main(train.main)")
    [line] = run("-c", program, "--out", tmp_path, code=2).stderr.splitlines()
    assert "process 2" in line and "it has 1" in line and "CUDA_VISIBLE_DEVICES=" in line
