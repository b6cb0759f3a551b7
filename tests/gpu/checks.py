"""On one GPU: a CPU's values and tokens, and nothing that waits. Takes under 3 minutes.

    TEST_DEVICE=cuda python -m pytest -q tests/gpu/checks.py
    TEST_DEVICE=cpu python -m pytest -q tests/gpu/checks.py     # to try the checks themselves

Its name keeps this file out of every other run of pytest, and tests/conftest.py hides the GPU from
those.
"""
import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn

from conftest import alone, losses, randomise, run
from connector import CONNECTORS, ConnectorConfig, new_connector
from data import Sample
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, AlignVLM, Llama, LlamaConfig
from paper.recipes import RECIPES
from plumbing import cuda, fast
from plumbing.processes import start_processes
from shipped import ANSWER, ASK, PAGE
from small_models import PROMPTS, SAMPLES, STEPS, generated, in_bytes, row_of, small_vlm
from train import optimizer_of, shard, take_step
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, normalise

DEVICE = torch.device(os.environ["TEST_DEVICE"])
ON_GPU = DEVICE.type == "cuda"
assert torch.cuda.is_available() == ON_GPU, "TEST_DEVICE is cuda, or cpu where a GPU is hidden"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in fp32 are in fp32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------
# The parts: values and gradients


def siglip() -> tuple[nn.Module, list[Tensor]]:
    """Heads of so400m's size."""
    config = SigLIPConfig(hidden_size=288, n_layers=2, n_heads=4, intermediate_size=400,
                          image_size=112)
    return SigLIP(config), [torch.randn(3, 3, 112, 112)]


def llama() -> tuple[nn.Module, list[Tensor]]:
    """Heads of Llama-3.2-1B's size, four to a group."""
    config = LlamaConfig(vocab_size=1000, hidden_size=256, n_layers=2, n_heads=8, n_kv_heads=2,
                         intermediate_size=512)
    return Llama(config), [torch.randint(1000, (2, 133))]


def connector(kind: str) -> tuple[nn.Module, list[Tensor]]:
    config = ConnectorConfig(kind, table_size=777, n_latents=16, n_heads=4, n_kv_heads=2,
                             head_dim=32)
    F, E_text = torch.randn(2, 64, 96), torch.randn(1001, 128)
    return new_connector(config, 96, 128, 1001), [F, E_text]


PARTS = {"siglip": siglip, "llama": llama}
PARTS |= {kind: lambda kind=kind: connector(kind) for kind in CONNECTORS}


def outcome(module: nn.Module, inputs: list[Tensor], device: torch.device,
            dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of weights and inputs, in fp64 on the CPU."""
    module = copy.deepcopy(module).to(device, dtype)
    fast.use(module)
    moved = []
    for x in inputs:
        learns = x.is_floating_point()
        x = x.detach().to(device, dtype if learns else x.dtype)
        moved.append(x.requires_grad_(learns))
    y = module(*moved)
    wave = torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y)
    y.backward(wave.to(device, dtype))
    gradients = [x.grad for x in (*module.parameters(), *moved) if x.grad is not None]
    return [x.detach().double().cpu() for x in (y, *gradients)]


def off(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The worst error of a tensor, as a share of its norm. A gradient that is nothing but rounding,
    that of a key's bias, is measured against a hundredth of the largest."""
    least = 0.01 * max(x.norm() for x in truth[1:])
    shares = [(truth[0] - ours[0]).norm() / truth[0].norm()]
    for x, true in zip(ours[1:], truth[1:], strict=True):
        shares.append((x - true).norm() / max(true.norm(), least))
    return max(shares).item()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_as_near_to_the_truth_as_on_a_cpu(name):
    module, inputs = PARTS[name]()
    randomise(module)
    cpu = torch.device("cpu")
    truth = outcome(module, inputs, cpu, torch.float64)
    assert off(outcome(module, inputs, DEVICE, FP32), truth) <= 1e-5
    ours = off(outcome(module, inputs, DEVICE, BF16), truth)
    theirs = off(outcome(module, inputs, cpu, BF16), truth)
    assert ours <= 2 * theirs + 2 ** -8, (ours, theirs)


@pytest.mark.parametrize("name", SIGLIP_PRESETS)
def test_tiles_are_normalised_to_a_cpus_bits(name):
    """All bytes, and a canvas around them."""
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256, 256)
    areas = [(0, 0, 256, 256), (0, 50, 256, 156)]
    config = SIGLIP_PRESETS[name]
    ours = normalise(pixels.to(DEVICE), areas, config)
    assert ours.device.type == DEVICE.type
    assert torch.equal(ours.cpu(), normalise(pixels, areas, config))


# ------------------------------------------------------------------------------------------------
# The whole: packed rows, and tokens


def vlm_of(dtype: torch.dtype) -> AlignVLM:
    """Heads of 64, two to a group."""
    vlm = small_vlm(scale=3.0, head_dim=64)
    return vlm.to(DEVICE, dtype)


def on_device(samples: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple:
    """A row as train.py hands it over: tokens and labels stay on the CPU."""
    tokens, labels, pixels, lengths = row_of(samples)
    return tokens, labels, pixels.to(DEVICE, dtype), lengths


@pytest.mark.parametrize("dtype, tolerance", [(FP32, 1e-5), (BF16, 2e-2)])
def test_packed_is_one_by_one(dtype, tolerance):
    vlm = vlm_of(dtype)
    fast.use(vlm)
    found = []
    for rows in ([SAMPLES], [[sample] for sample in SAMPLES]):
        vlm.zero_grad()
        loss = sum(vlm(*on_device(row, dtype)) for row in rows)
        loss.backward()
        gradients = [p.grad for p in vlm.parameters()]
        found.append([x.detach().double().cpu() for x in (loss, *gradients)])
    assert off(*found) <= tolerance


@torch.inference_mode()
def test_cached_tokens_are_those_without_a_cache_and_a_cpus():
    """In fp32, where nothing is as good as equal."""
    vlm = vlm_of(FP32)
    expected = generated(copy.deepcopy(vlm).to("cpu"), PROMPTS)
    fast.use(vlm, inference=True)
    together = generated(vlm, PROMPTS)
    assert together == expected
    assert [generated(vlm, [prompt])[0] for prompt in PROMPTS] == expected
    assert [uncached(vlm, *prompt) for prompt in PROMPTS] == expected
    if ON_GPU:
        assert isinstance(vlm.llm.next_hidden, cuda.NextHidden) and vlm.llm.next_hidden.records


def uncached(vlm: AlignVLM, tokens: Tensor, pixels: Tensor) -> list[int]:
    """The greedy answer: the whole sequence anew for every token."""
    answer = []
    x = vlm.embed(tokens[None], pixels.to(vlm.llm.embed_tokens.weight))
    for _ in range(STEPS):
        answer.append(vlm.llm.logits(vlm.llm.hidden(x)[0, -1]).argmax().item())
        last = torch.tensor([[answer[-1]]], device=DEVICE)
        x = torch.cat([x, nnf.embedding(last, vlm.llm.embed_tokens.weight)], dim=1)
    return answer


@torch.inference_mode()
def test_cached_tokens_in_bf16_are_among_the_best_without_a_cache():
    """Several are as good as equal then: their scores differ by less than rounding."""
    vlm = vlm_of(BF16)
    fast.use(vlm, inference=True)
    for prompt, answer in zip(PROMPTS, generated(vlm, PROMPTS)):
        x = vlm.embed(prompt[0][None], prompt[1].to(vlm.llm.embed_tokens.weight))
        after = torch.tensor([answer], device=DEVICE)
        x = torch.cat([x, nnf.embedding(after, vlm.llm.embed_tokens.weight)], dim=1)
        scores = vlm.llm.logits(vlm.llm.hidden(x))[0, -len(answer) - 1:-1].float()   # (STEPS, V)
        said = scores.gather(1, after.T)
        worse = scores.max(dim=1, keepdim=True).values - said
        assert worse.max() <= 0.03 * scores.abs().max()


@torch.inference_mode()
def test_a_prompt_after_a_kept_prefix():
    """Several queries of a group, under a mask: fp32 and bf16 beside the whole prompt."""
    for dtype, tolerance in ((FP32, 1e-5), (BF16, 3e-2)):
        llm = vlm_of(dtype).llm
        fast.use(llm, inference=True)
        x = torch.randn(1, 90, llm.config.hidden_size, device=DEVICE, dtype=dtype)
        whole = llm.hidden(x)[:, 70:].double().cpu()
        prefix = llm.new_cache(1, 70)
        llm.hidden(x[:, :70], cache=prefix)
        cache = llm.new_cache(1, 20, prefix)
        after = llm.hidden(x[:, 70:], None, cache, torch.arange(70, 90, device=DEVICE)[None])
        error = (after.double().cpu() - whole).norm() / whole.norm()
        assert error <= tolerance


# ------------------------------------------------------------------------------------------------
# The commands


def test_the_shipped_model_answers_as_on_a_cpu():
    command = ["sample.py", "--device", DEVICE.type]
    done = run(*command, *ASK, start=alone)
    assert done.stdout == f"{ANSWER}\n" and f"on {DEVICE.type}" in done.stderr
    assert "without a CUDA graph" not in done.stderr
    read = run(*command, "--image", PAGE, start=alone)
    assert read.stdout.splitlines()[-1] == ANSWER


def test_a_stage_recomputed_and_compiled_stopped_and_resumed(tmp_path, monkeypatch):
    """Its losses are those of a CPU in fp32, within bf16's rounding."""
    monkeypatch.chdir(tmp_path)
    command = ["train.py", "--stage", 1, "--steps", 6, "--batch-size", 4]
    fast_ones = ["--recompute", "--compile", "--out", tmp_path / "stopped"]
    run(*command, *fast_ones, "--max-steps", 3, start=alone)
    assert not (tmp_path / "stopped" / "stage1").exists()
    run(*command, *fast_ones, start=alone)
    hidden = ("import os, runpy, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; "
              "sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')")
    run("-c", hidden, *command, "--out", tmp_path / "cpu", start=alone)
    expected = losses(tmp_path / "cpu" / "stage1")
    assert len(set(expected)) == 6
    assert losses(tmp_path / "stopped" / "stage1") == pytest.approx(expected, rel=0.01)
    state = json.loads((tmp_path / "stopped" / "stage1" / "log.jsonl").read_text().splitlines()[3])
    assert state["resumed"] == 3


# ------------------------------------------------------------------------------------------------
# A step of train.py


@pytest.fixture
def one_process():
    yield start_processes()
    dist.destroy_process_group()


def toy_row(config, *texts: int) -> list[Sample]:
    """Samples of a tile and so many tokens of text."""
    samples = []
    for n_text in texts:
        visual = torch.full((config.tile_tokens,), IMAGE)
        tokens = torch.cat([visual, torch.arange(n_text) + 5])
        labels = torch.cat([torch.full_like(visual, IGNORE), torch.arange(n_text) + 6])
        samples.append(Sample(tokens, labels, *in_bytes(torch.randn(1, 3, 112, 112)), "", 1))
    return samples


def test_an_offloaded_model_learns_the_same(one_process):
    """Its weights stay in the CPU's memory; one step's losses and norm are those without."""
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = AlignVLM(ALIGNVLM_PRESETS["toy"])
        model.init_weights()
        model.to("cpu" if offload else one_process)
        fast.use(model)
        shard(model, one_process, offload=offload)
        optimizer = optimizer_of(model, RECIPES["toy"][2])
        rows = [toy_row(model.config, 20, 33)]
        steps = [take_step(model, optimizer, rows, 1e-3, 1.0, one_process) for _ in range(4)]
        if ON_GPU:
            torch.cuda.synchronize()
        found.append([step[0][:2] for step in steps])
    assert all(p.device.type == "cpu" for p in model.parameters())
    for expected, step in zip(*found):
        assert step.tolist() == pytest.approx(expected.tolist(), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_step_waits_for_the_gpu(one_process, recompute):
    """Two rows under FSDP2: the host is ahead of the device all the time. The loss falls."""
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    model.init_weights()
    model.to(one_process)
    fast.use(model)
    shard(model, one_process, recompute=recompute)
    recipe = replace(RECIPES["toy"][2], lr_scale={})
    optimizer = optimizer_of(model, recipe)
    rows = [toy_row(model.config, 20, 33), toy_row(model.config, 41, 12)]

    def step() -> Tensor:
        return take_step(model, optimizer, rows, 1e-3, 1.0, one_process)[0]

    first = [step() for _ in range(3)]
    unwatched = without_waiting(lambda: [step() for _ in range(3)])
    assert unwatched[-1][0] < first[0][0]


def without_waiting(work: Callable):
    """What `work` returns. Raises where it waits for the GPU."""
    if not ON_GPU:
        return work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return result
