"""The connectors that the paper compares Align with: their mathematics, and that each trains, saves, samples and shards.

Started by itself, or by torchrun, it prints the losses of two steps of each.
"""
import json
import random
import sys
import tempfile
import types
import unittest.mock
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import connector as connector_py
import sample as sample_py
from conftest import ROOT, close, n_parameters, randomise, run, torchrun
from connector import CONNECTORS, MLP, Align, ConnectorConfig, Ovis, Perceiver, new_connector
from data import Sample, Tokenizer
from sample import answer
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig, read_config
from paper.connectors import NOISE, patch_words
from paper.connectors import table as race_table
from paper.plan import memory, step_flops
from plumbing.processes import start_processes
from plumbing.settings import CheckpointError, InputError
from toy.pages import draw, eye_chart, write_toy_tokenizer
from train import RECIPES, connector_of, optimizer_of, shard, take_step
from vision import SigLIPConfig

OTHERS = [kind for kind in CONNECTORS if kind != "align"]
SMALL = ConnectorConfig(table_size=37, n_latents=5, depth=2, n_heads=4, n_kv_heads=2, head_dim=6)
VISION = SigLIPConfig(hidden_size=12, n_layers=1, n_heads=2, intermediate_size=20, image_size=12, patch_size=3)
LLM = LlamaConfig(vocab_size=23, hidden_size=10, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=6, intermediate_size=14,
                  rope_factor=1.0)


def small_vlm(kind):
    return randomise(AlignVLM(AlignVLMConfig(VISION, LLM, replace(SMALL, kind=kind))))


def same_gradients(ours, theirs, their_name=lambda name: name):
    theirs = dict(theirs)
    assert len(theirs) == len(dict(ours))
    for name, p in ours:
        close(p.grad, theirs[their_name(name)].grad)


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations and against transformers


@pytest.mark.parametrize("shape, d, D", [((2, 9), 12, 10), ((1, 1), 3, 7), ((17,), 8, 8)])
def test_mlp_is_llavas(shape, d, D):
    ours, theirs = randomise(MLP(d, D)), torch.nn.Sequential(torch.nn.Linear(d, D), torch.nn.GELU(), torch.nn.Linear(D, D))
    theirs.load_state_dict({{"fc1": "0", "fc2": "2"}[k[:3]] + k[3:]: p for k, p in ours.state_dict().items()})
    F = torch.randn(*shape, d)
    F_ours, F_theirs = ours(F, None), theirs(F)
    assert F_ours.shape == (*shape, D)
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    same_gradients(ours.named_parameters(), theirs.named_parameters(), lambda k: {"fc1": "0", "fc2": "2"}[k[:3]] + k[3:])


@pytest.mark.parametrize("shape, d, D, K", [((2, 9), 12, 10, 37), ((1, 1), 3, 7, 5), ((70,), 8, 3, 131)])
@pytest.mark.parametrize("block_bytes", [1, 2 ** 28])
def test_ovis_is_a_mixture_of_its_table(shape, d, D, K, block_bytes, monkeypatch):
    """In blocks and as one, against Linear, LayerNorm, softmax and a product with the table, written out."""
    monkeypatch.setattr(connector_py, "BLOCK_BYTES", block_bytes)
    ours = randomise(Ovis(d, D, K))
    F = torch.randn(*shape, d, requires_grad=True)
    F_ours = ours(F, None)
    assert F_ours.shape == (*shape, D)
    p = {name: p.detach().clone().requires_grad_() for name, p in [("F", F), *ours.named_parameters()]}
    z = p["F"] @ p["W_VET.weight"].T
    u = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    e = (u * p["norm_K.weight"] + p["norm_K.bias"]).exp()
    F_theirs = e / e.sum(-1, keepdim=True) @ p["table"]
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    same_gradients([("F", F), *ours.named_parameters()], p.items())


def idefics2(D, config):
    return transformers.Idefics2Config(
        perceiver_config=dict(hidden_size=D, resampler_n_latents=config.n_latents, resampler_depth=config.depth,
                              resampler_n_heads=config.n_heads, resampler_head_dim=config.head_dim,
                              num_key_value_heads=config.n_kv_heads))


def their_name(name):
    """Of Idefics2Connector's tensors."""
    if name.startswith("projection."):
        return name.replace("projection", "modality_projection")
    for ours, theirs in [("latents_norm", "input_latents_norm"), ("context_norm", "input_context_norm"),
                         ("mlp_norm", "post_attention_layernorm"), *((f"{x}_proj", f"self_attn.{x}_proj") for x in "qkvo")]:
        name = name.replace(f".{ours}.", f".{theirs}.")
    return f"perceiver_resampler.{name}"


@pytest.mark.parametrize("T, N, d, D, config", [
    (2, 16, 12, 10, SMALL), (1, 1, 3, 7, ConnectorConfig(n_latents=1, depth=1, n_heads=3, n_kv_heads=3, head_dim=5)),
    (3, 31, 9, 24, ConnectorConfig(n_latents=11, depth=3, n_heads=6, n_kv_heads=1, head_dim=7)),
    (1, 49, 48, 64, ConnectorConfig())], ids=["small", "ones", "odd", "as released"])
def test_perceiver_is_idefics2s(T, N, d, D, config):
    """With Idefics2Connector's projection 4 D wide: outputs, and the gradients of F and of every weight."""
    settings = idefics2(D, config)
    settings.vision_config.hidden_size, settings.perceiver_config.hidden_size = d, D
    settings.text_config.hidden_size, settings.text_config.intermediate_size = D, 4 * D
    settings.perceiver_config.rms_norm_eps = 1e-6       # as released; the line that mends the size takes the LLM's
    settings._attn_implementation = "sdpa"
    ours, theirs = randomise(Perceiver(d, D, config)), Idefics2Connector(settings)
    theirs.load_state_dict({their_name(k): p for k, p in ours.state_dict().items()})
    F = [torch.randn(T, N, d).requires_grad_()]
    F.append(F[0].detach().clone().requires_grad_())
    F_ours, F_theirs = ours(F[0], None), theirs(F[1], torch.ones(T, N, dtype=torch.bool))
    assert F_ours.shape == (T, config.n_latents, D)
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    close(F[0].grad, F[1].grad)
    scale = max(p.grad.abs().max().item() for p in theirs.parameters())
    theirs = dict(theirs.named_parameters())
    assert len(theirs) == len(dict(ours.named_parameters()))
    for name, p in ours.named_parameters():
        if N + config.n_latents == 2 and "q_proj" in name:
            close(p.grad, theirs[their_name(name)].grad, scale=scale)
        else:
            close(p.grad, theirs[their_name(name)].grad)


def test_new_ones_start_as_they_should():
    """Matrices keep the size of what comes in, latents and table are N(0, 1), and the LLM's words play no part."""
    torch.manual_seed(0)
    d, D, V = 64, 96, 50
    E = torch.randn(V, D)
    for kind in OTHERS:
        new = new_connector(replace(SMALL, kind=kind, table_size=4096), d, D, V)
        new.init_weights(E)
        weights = dict(new.named_parameters())
        assert all(p.isfinite().all() for p in weights.values())
        F = torch.randn(2, 9, d)
        assert torch.equal(new(F, E), new(F, E + 1))
        for name, p in weights.items():
            if p.ndim == 1:
                assert (p == (0 if name.endswith("bias") else 1)).all()
            else:
                std = 1 if name in ("table", "latents") else p.shape[1] ** -0.5
                assert p.std().item() == pytest.approx(std, rel=0.1), (kind, name)
    assert isinstance(new_connector(ConnectorConfig(), d, D, V), Align)


# ---------------------------------------------------------------------------------------------------------------------
# Inside AlignVLM


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_model_with_it_learns_and_counts_its_tokens(kind):
    model = small_vlm(kind)
    n = 5 if kind == "perceiver" else 16
    assert model.config.tile_tokens == n
    pixels = torch.randn(2, 3, 12, 12)
    tokens = torch.cat([torch.full((2 * n,), IMAGE), torch.arange(8)])
    labels = torch.full_like(tokens, -100)
    labels[-8:-1] = torch.arange(1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens[None], labels[None], pixels, [len(tokens)])
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match=f"{2 * n + 1} image positions for {2 * n} visual tokens"):
        model.embed(torch.full((1, 2 * n + 1), IMAGE), pixels)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_saved_and_loaded(kind, tmp_path):
    model, tokenizer = small_vlm(kind), tmp_path / "tokenizer.model"
    write_toy_tokenizer(tokenizer)
    model.save_pretrained(tmp_path / "m", tokenizer, torch.float32)
    assert read_config(tmp_path / "m") == model.config
    again = AlignVLM.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(p, again[name]) for name, p in model.state_dict().items()) and len(again) == len(model.state_dict())

    # Another connector, new, on the folder's vision encoder and LLM.
    other = replace(SMALL, kind="mlp" if kind != "mlp" else "ovis")
    torch.manual_seed(3)
    changed = AlignVLM.from_pretrained(tmp_path / "m", connector=other)
    assert changed.config.connector == other and isinstance(changed.connector, type(new_connector(other, 1, 1, 1)))
    assert all(torch.equal(p, changed.state_dict()[name]) for name, p in model.state_dict().items()
               if not name.startswith("connector."))
    torch.manual_seed(3)
    alone = new_connector(other, 12, 10, 23)
    torch.manual_seed(3)
    alone.init_weights(model.llm.head)
    assert all(torch.equal(p, changed.connector.state_dict()[name]) for name, p in alone.state_dict().items())


def test_a_folder_of_before_has_align_and_a_wrong_one_is_one_line(tmp_path):
    model = small_vlm("align")
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    model.save_pretrained(tmp_path / "m", tmp_path / "tokenizer.model", torch.float32)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    section = config.pop("connector")
    path.write_text(json.dumps(config))
    again = AlignVLM.from_pretrained(tmp_path / "m")
    assert again.config.connector == ConnectorConfig() and torch.equal(again.connector.W2.weight, model.connector.W2.weight)
    for wrong in ({**section, "kind": "mpl"}, {**section, "kind": None}, {**section, "depth": 0}, {**section, "width": 3},
                  {"kind": "mlp"}, {**section, "table_size": 2.5}, 3):
        path.write_text(json.dumps({**config, "connector": wrong}))
        with pytest.raises(CheckpointError) as error:
            AlignVLM.from_pretrained(tmp_path / "m")
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_presets():
    assert {preset.connector.kind for preset in ALIGNVLM_PRESETS.values()} == {"align"}
    real = ALIGNVLM_PRESETS["llama-3.2-1b"].connector
    assert (real.table_size, real.n_latents, real.depth, real.n_heads, real.head_dim, real.n_kv_heads) == (65536, 64, 3, 16, 96, 4)
    with torch.device("meta"):
        ovis = new_connector(replace(real, kind="ovis"), 1152, 2048, 128256)
    assert n_parameters(ovis) == 65536 * (1152 + 2 + 2048)


@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("trainable", [("vision", "connector", "llm"), ("connector", "llm"), ("connector",)])
def test_flops_are_what_torch_counts(kind, trainable, monkeypatch):
    """In attention's plain form, which torch's counter knows: there the LLM's is not causal and counts twice; and where the LLM
    is frozen half as much again, for attention has no weights whose gradient could be left out. With the mixtures written
    as equations: what is computed a second time is not the model's."""
    config = AlignVLMConfig(replace(VISION, n_layers=2, hidden_size=20), replace(LLM, n_layers=2), replace(SMALL, kind=kind))
    model = randomise(AlignVLM(config))
    for name, module in model.named_children():
        module.requires_grad_(name in trainable)
    monkeypatch.setattr(connector_py.Mixture, "apply", lambda h, W2, weight, bias, E, eps: nnf.softmax(
        nnf.layer_norm(h @ W2.T, weight.shape, weight, bias, eps), -1) @ E)
    tokens = torch.cat([torch.full((3 * config.tile_tokens,), IMAGE), torch.arange(17)])
    labels = torch.full_like(tokens, -100)
    labels[-9:] = 7
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)      # whose products are not counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens[None], labels[None], torch.randn(3, 3, 12, 12), [len(tokens)]).backward()
    counts = Counter(tokens=len(tokens), supervised=9, tiles=3, squares=(2 if "llm" in trainable else 3) * len(tokens) ** 2)
    assert step_flops(config, trainable, counts) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_memory_is_about_what_it_takes(kind, monkeypatch):
    """Forward and backward of two tiles: the most in memory beyond the gradients that stay; as on a GPU, for oneDNN's
    products need some more."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    config = AlignVLMConfig(replace(VISION, hidden_size=64, image_size=42), replace(LLM, hidden_size=96, vocab_size=700),
                            ConnectorConfig(kind, table_size=1000, n_latents=16, n_heads=4, n_kv_heads=2, head_dim=32))
    model = new_connector(config.connector, 64, 96, 700)
    model.init_weights(torch.randn(700, 96))
    F, E_text = torch.randn(2, 196, 64, requires_grad=True), torch.randn(700, 96, requires_grad=True)
    model(F, E_text).sum().backward()       # now the gradients are there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(F, E_text).sum().backward()
    live, most = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    planned = memory(config, ("connector",), 1, 2 * config.tile_tokens, 2, 1, size=4)
    assert planned["connector"] == pytest.approx(most - live, rel=0.3)
    assert planned["parameters"] == 4 * n_parameters(AlignVLM(config)) and planned["gradients"] == 4 * n_parameters(model)


# ---------------------------------------------------------------------------------------------------------------------
# As users run them


def sharded_losses(kind, device):
    """Two steps on four samples, dealt among the ranks; of all kinds with one seed."""
    torch.manual_seed(0)
    model = AlignVLM(AlignVLMConfig(VISION, LLM, replace(SMALL, kind=kind)))
    model.vision.init_weights()
    model.llm.init_weights()
    shard(model, device)
    model.connector.init_weights(model.llm.head)
    samples = []
    for i in range(4):
        tokens = torch.cat([torch.full((model.config.tile_tokens,), IMAGE), torch.arange(i, i + 6)])
        samples.append(Sample(tokens, tokens.roll(-1).clamp(min=0), torch.randn(1, 3, 12, 12), str(i)))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer, losses = optimizer_of(model, RECIPES["toy"][2]), []
    for _ in range(2):
        numbers, _, _ = take_step(model, optimizer, [[s] for s in samples[rank::world]], 1e-2, 1.0, device)
        losses.append(numbers[0].item())
    return losses


def test_two_ranks_start_and_learn_as_one():
    """5 latents and 37 rows of a table do not divide evenly by two."""
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (
        run(ROOT / "tests" / "system" / "test_connectors.py"), torchrun(2, ROOT / "tests" / "system" / "test_connectors.py")))
    for kind in OTHERS:
        assert two[kind] == pytest.approx(one[kind], rel=1e-5) and one[kind][0] != one[kind][1]


@pytest.mark.parametrize("kind", OTHERS)
def test_it_answers_and_has_no_words_to_choose(kind, tmp_path, capsys):
    config = replace(ALIGNVLM_PRESETS["toy"], connector=replace(ALIGNVLM_PRESETS["toy"].connector, kind=kind, n_latents=7))
    model = randomise(AlignVLM(config))
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    model.save_pretrained(tmp_path / "m", tmp_path / "tokenizer.model", torch.float32)
    page = draw(eye_chart(random.Random(0)))
    *_, [text] = answer(model.eval(), Tokenizer(tmp_path / "m", 542), [page], ["?"], max_new_tokens=3)
    assert isinstance(text, str)
    page.save(tmp_path / "page.png")
    argv = ["sample.py", "--checkpoint", str(tmp_path / "m"), "--image", str(tmp_path / "page.png"), "--align-vocab", "5"]
    with unittest.mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as status:
        sample_py.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert status.value.code == 2 and error.startswith("sample.py: --align-vocab") and kind in error


def test_stages_choose_and_keep_it(tmp_path):
    """Stage 1 makes what is asked for; later stages have what is there, and refuse another."""
    args = types.SimpleNamespace(llm=None, connector_settings={"kind": "ovis", "table_size": 9})
    toy = ALIGNVLM_PRESETS["toy"].connector
    assert connector_of(0, tmp_path, args) == toy
    assert connector_of(1, tmp_path, args) == replace(toy, kind="ovis", table_size=9)
    model = small_vlm("ovis")
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    model.save_pretrained(tmp_path / "m", tmp_path / "tokenizer.model", torch.float32)
    with pytest.raises(InputError, match="has the connector ovis"):
        connector_of(2, tmp_path / "m", args)
    for asked in ({}, {"kind": "ovis"}, {"kind": "ovis", "table_size": 37}):
        assert connector_of(2, tmp_path / "m", types.SimpleNamespace(connector_settings=asked)) == model.config.connector


def test_the_race_teaches_the_encoder_what_stands_in_each_patch():
    """paper/connectors.py: the words of a page's patches are those of its lines, tile by tile."""
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    with tempfile.TemporaryDirectory() as folder:
        write_toy_tokenizer(Path(folder) / "tokenizer.model")
        tokenizer = Tokenizer(Path(folder))
    for seed in range(20):
        pixels, words = patch_words(random.Random(seed), model, tokenizer)
        assert words.shape == (len(pixels), model.config.vision.n_patches)
        patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)                    # (T, 3, 8, 8, 14, 14)
        blank = (patches == patches.amin((4, 5), keepdim=True)).all(5).all(4).all(1).flatten(1)     # (T, N)
        legible = slice(0, None) if len(pixels) == 1 else slice(1, None)        # the whole page is not
        assert torch.equal(words[legible] == tokenizer.encode(" ")[0], blank[legible])
        assert len(pixels) == 1 or (words[0] == tokenizer.encode(" ")[0]).all()


def test_the_races_table_has_mean_and_spread():
    def a_run(score, reached):
        return {"exact_match": score, "noise": [{"score": score - 1, "cosine_distance": 0.25}] * len(NOISE),
                "samples_to_90": reached, "parameters": 1234, "seconds": 60.0}
    lines = race_table({"align": [a_run(90.0, 1600), a_run(81.0, None)], "mlp": [a_run(50.0, None)]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {len(NOISE) + 8}
    assert cells[2][:3] == ["align", "85.5 (81.0 to 90.0)", "84.5 (80.0 to 89.0)"]
    assert cells[2][-6:] == ["0.2500", "1,600, never", "1,234", "60", "58.81", "-1.67"]
    assert cells[3][:2] == ["mlp", "50.0"] and cells[3][-5] == "never"


if __name__ == "__main__":
    device = start_processes(timedelta(seconds=60))
    everything = {kind: sharded_losses(kind, device) for kind in OTHERS}
    if torch.distributed.get_rank() == 0:
        print(json.dumps(everything))
    torch.distributed.destroy_process_group()
