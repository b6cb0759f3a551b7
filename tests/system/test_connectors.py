"""The connectors that the paper compares Align with: each trains, saves, samples and shards.

The Perceiver stands beside transformers'. What the others compute is in
tests/method/test_connector.py.
"""
import json
import random
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

import connector as connector_py
from conftest import HELPERS, close, n_parameters, randomise, run, sample, torchrun
from connector import CONNECTORS, ConnectorConfig, Perceiver, new_connector
from data import Tokenizer
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, AlignVLM, AlignVLMConfig, read_config
from paper.connectors import BATCH, NOISE, STEPS, patch_token_ids, result_of
from paper.connectors import table as race_table
from paper.plan import memory, step_flops
from plumbing.settings import CheckpointError, InputError
from sample import answer
from small_models import CONNECTOR, LLM, TILES, small_llama
from toy.pages import draw, eye_chart, write_toy_tokenizer
from train import connector_of
from vision import SigLIPConfig

OTHERS = [kind for kind in CONNECTORS if kind != "align"]


def small_vlm(kind: str) -> AlignVLM:
    return randomise(AlignVLM(AlignVLMConfig(TILES, LLM, replace(CONNECTOR, kind=kind))))


def saved(model: AlignVLM, folder):
    """The model in a folder, with the toy's tokenizer."""
    write_toy_tokenizer(folder / "tokenizer.model")
    model.save_pretrained(folder / "m", folder / "tokenizer.model", torch.float32)
    return folder / "m"


# ------------------------------------------------------------------------------------------------
# The Perceiver against transformers


def idefics2(d: int, D: int, config: ConnectorConfig) -> Idefics2Connector:
    """With its projection 4 D wide."""
    settings = transformers.Idefics2Config(perceiver_config=dict(
        hidden_size=D, resampler_n_latents=config.n_latents, resampler_depth=config.depth,
        resampler_n_heads=config.n_heads, resampler_head_dim=config.head_dim,
        num_key_value_heads=config.n_kv_heads))
    settings.vision_config.hidden_size = d
    settings.perceiver_config.hidden_size = D
    settings.text_config.hidden_size = D
    settings.text_config.intermediate_size = 4 * D
    # As released; the line that mends the size takes the LLM's.
    settings.perceiver_config.rms_norm_eps = 1e-6
    settings._attn_implementation = "sdpa"
    return Idefics2Connector(settings)


THEIR_PARTS = {"latents_norm": "input_latents_norm", "context_norm": "input_context_norm",
               "mlp_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
               "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
               "o_proj": "self_attn.o_proj"}


def their_name(name: str) -> str:
    """Of Idefics2Connector's tensors."""
    if name.startswith("projection."):
        return name.replace("projection", "modality_projection")
    for ours, theirs in THEIR_PARTS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return f"perceiver_resampler.{name}"


ONES = ConnectorConfig(n_latents=1, depth=1, n_heads=3, n_kv_heads=3, head_dim=5)
ODD = ConnectorConfig(n_latents=11, depth=3, n_heads=6, n_kv_heads=1, head_dim=7)


@pytest.mark.parametrize("T, N, d, D, config", [
    (2, 16, 12, 10, CONNECTOR), (1, 1, 3, 7, ONES), (3, 31, 9, 24, ODD),
    (1, 49, 48, 64, ConnectorConfig())], ids=["small", "ones", "odd", "as released"])
def test_perceiver_is_idefics2s(T, N, d, D, config):
    """Outputs, and the gradients of F and of every weight."""
    ours, theirs = randomise(Perceiver(d, D, config)), idefics2(d, D, config)
    theirs.load_state_dict({their_name(name): p for name, p in ours.state_dict().items()})
    our_F = torch.randn(T, N, d).requires_grad_()
    their_F = our_F.detach().clone().requires_grad_()
    F_ours = ours(our_F, None)
    F_theirs = theirs(their_F, torch.ones(T, N, dtype=torch.bool))
    assert F_ours.shape == (T, config.n_latents, D)
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    close(our_F.grad, their_F.grad)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert len(expected) == len(list(ours.parameters()))
    for name, p in ours.named_parameters():
        # Of two positions, rounding noise: measured against the largest gradient.
        noise = N + config.n_latents == 2 and "q_proj" in name
        close(p.grad, expected[their_name(name)], scale=largest if noise else None)


# ------------------------------------------------------------------------------------------------
# Inside AlignVLM


def same_tensors(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_saved_and_loaded(kind, tmp_path):
    model = small_vlm(kind)
    folder = saved(model, tmp_path)
    assert read_config(folder) == model.config
    same_tensors(model.state_dict(), AlignVLM.from_pretrained(folder).state_dict())

    # Another connector, new, on the folder's vision encoder and LLM.
    other = replace(CONNECTOR, kind="mlp" if kind != "mlp" else "ovis")
    torch.manual_seed(3)
    changed = AlignVLM.from_pretrained(folder, connector=other)
    assert changed.config.connector == other
    same_tensors(model.vision.state_dict(), changed.vision.state_dict())
    same_tensors(model.llm.state_dict(), changed.llm.state_dict())
    alone = new_connector(other, 12, 10, 23)
    assert isinstance(changed.connector, type(alone))
    torch.manual_seed(3)
    alone.init_weights(model.llm.head)
    same_tensors(alone.state_dict(), changed.connector.state_dict())


def test_a_wrong_connector_in_a_folder_is_one_line(tmp_path):
    """Wrong settings, too few of them, and none at all."""
    path = saved(small_vlm("align"), tmp_path) / "config.json"
    config = json.loads(path.read_text())
    section = config["connector"]
    for wrong in ({**section, "kind": "mpl"}, {**section, "kind": None}, {**section, "depth": 0},
                  {**section, "width": 3}, {"kind": "mlp"}, {**section, "table_size": 2.5}, 3, {}):
        path.write_text(json.dumps({**config, "connector": wrong}))
        with pytest.raises(CheckpointError) as error:
            AlignVLM.from_pretrained(path.parent)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    del config["connector"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="connector"):
        AlignVLM.from_pretrained(path.parent)


def naive_mixture(h, W2, weight, bias, E_text, eps, multiply):
    """connector.Mixture as equations: nothing is computed a second time."""
    return nnf.softmax(nnf.layer_norm(h @ W2.T, weight.shape, weight, bias, eps), -1) @ E_text


TOY = ALIGNVLM_PRESETS["toy"]
COUNTED = {
    "small": AlignVLMConfig(replace(TILES, n_layers=2, hidden_size=20), replace(LLM, n_layers=2),
                            CONNECTOR),
    "odd": AlignVLMConfig(
        SigLIPConfig(48, 3, 4, 80, 32, 8),
        small_llama(vocab_size=331, hidden_size=36, n_layers=3, n_heads=6, head_dim=10,
                    intermediate_size=52), CONNECTOR),
    "toy": replace(TOY, connector=replace(TOY.connector, table_size=1000)),
}


@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("sizes", COUNTED)
@pytest.mark.parametrize("trainable", [("vision", "connector", "llm"), ("connector", "llm"),
                                       ("connector",)])
def test_flops_are_what_torch_counts(kind, sizes, trainable, monkeypatch):
    """In attention's plain form, which torch's counter knows.

    There the LLM's is not causal and counts twice; and where the LLM is frozen half as much
    again, for attention has no weights whose gradient could be left out.
    """
    config = COUNTED[sizes]
    config = replace(config, connector=replace(config.connector, kind=kind))
    model = randomise(AlignVLM(config))
    for name, module in model.named_children():
        module.requires_grad_(name in trainable)
    monkeypatch.setattr(connector_py.Mixture, "apply", naive_mixture)
    tokens = torch.cat([torch.full((3 * config.tile_tokens,), IMAGE), torch.arange(17)])
    labels = torch.full_like(tokens, IGNORE)
    labels[-9:] = 7
    side = config.vision.image_size
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(tokens[None], labels[None], torch.randn(3, 3, side, side), [len(tokens)])
        loss.backward()
    squares = (2 if "llm" in trainable else 3) * len(tokens) ** 2
    counts = Counter(tokens=len(tokens), supervised=9, tiles=3, squares=squares)
    expected = counter.get_total_flops()
    assert step_flops(config, trainable, counts) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_memory_is_about_what_it_takes(kind):
    """Forward and backward of two tiles: the most in memory beyond the gradients that stay."""
    connector = ConnectorConfig(kind, table_size=1000, n_latents=16, n_heads=4, n_kv_heads=2,
                                head_dim=32)
    config = AlignVLMConfig(replace(TILES, hidden_size=64, image_size=42),
                            replace(LLM, hidden_size=96, vocab_size=700), connector)
    model = new_connector(connector, 64, 96, 700)
    model.init_weights(torch.randn(700, 96))
    F = torch.randn(2, 196, 64, requires_grad=True)
    E_text = torch.randn(700, 96, requires_grad=True)
    model(F, E_text).sum().backward()       # now the gradients are there
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        model(F, E_text).sum().backward()
    live, most = 0, 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    planned = memory(config, ("connector",), 1, 2 * config.tile_tokens, 2, 1, size=4)
    assert planned["connector"] == pytest.approx(most - live, rel=0.3)
    assert planned["parameters"] == 4 * n_parameters(AlignVLM(config))
    assert planned["gradients"] == 4 * n_parameters(model)


# ------------------------------------------------------------------------------------------------
# As users run them


def test_two_ranks_start_and_step_as_one():
    one = json.loads(run(HELPERS / "connector_steps.py").stdout.splitlines()[-1])
    two = json.loads(torchrun(2, HELPERS / "connector_steps.py").stdout.splitlines()[-1])
    assert set(one) == set(OTHERS)
    for kind in OTHERS:
        assert two[kind] == pytest.approx(one[kind], rel=1e-5) and one[kind][0] != one[kind][1]


@pytest.mark.parametrize("kind", OTHERS)
def test_it_answers_and_has_no_tokens_to_choose(kind, tmp_path):
    connector = replace(TOY.connector, kind=kind, n_latents=7)
    model = randomise(AlignVLM(replace(TOY, connector=connector))).eval()
    folder = saved(model, tmp_path)
    page = draw(eye_chart(random.Random(0)))
    *_, [text] = answer(model, Tokenizer(folder, 542), [page], ["?"], max_new_tokens=3)
    assert isinstance(text, str)
    page.save(tmp_path / "page.png")
    done = sample("--checkpoint", folder, "--image", tmp_path / "page.png", "--align-vocab",
                  code=2)
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"sample.py: {folder} has the connector {kind}")


def test_stages_choose_and_keep_it(tmp_path):
    """Stage 1 makes what is asked for; later stages have what is there, and refuse another."""
    asked = types.SimpleNamespace(llm=None, connector="mlp")
    assert connector_of(0, tmp_path, asked) == TOY.connector
    assert connector_of(1, tmp_path, asked) == replace(TOY.connector, kind="mlp")
    model = small_vlm("ovis")
    folder = saved(model, tmp_path)
    with pytest.raises(InputError, match="has the connector ovis"):
        connector_of(2, folder, asked)
    for kind in (None, "ovis"):
        asked = types.SimpleNamespace(llm=None, connector=kind)
        assert connector_of(2, folder, asked) == model.config.connector


# ------------------------------------------------------------------------------------------------
# paper/connectors.py


def test_the_race_teaches_the_encoder_what_stands_in_each_patch(tmp_path):
    """The tokens of a page's patches are those of its lines, tile by tile."""
    model = AlignVLM(TOY)
    write_toy_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(tmp_path)
    space = tokenizer.encode(" ")[0]
    for seed in range(20):
        pixels, token_ids = patch_token_ids(random.Random(seed), model, tokenizer)
        assert token_ids.shape == (len(pixels), model.config.vision.n_patches)
        patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)            # (T, 3, 8, 8, 14, 14)
        one_colour = patches == patches.amin((4, 5), keepdim=True)
        blank = one_colour.all(5).all(4).all(1).flatten(1)              # (T, N)
        if len(pixels) > 1:         # the whole page, which comes first, is not legible
            assert (token_ids[0] == space).all()
            token_ids, blank = token_ids[1:], blank[1:]
        assert torch.equal(token_ids == space, blank)


def test_a_race_is_counted_over_its_stages(tmp_path):
    """90 % of the answers are right after the fiftieth step of stage 3, and all of stages 1 and 2.
    Each stage's log has two steps, of half a second."""
    (tmp_path / "eval").mkdir()
    noise = [{"sigma": 1.0, "score": 70.0}]
    (tmp_path / "eval" / "scores.json").write_text(json.dumps(
        {"scores": {"toy": {"exact_match": 0.875, "other": 0.5}}, "noise": {"toy": noise}}))
    model = AlignVLM(TOY)
    saved(model, tmp_path).rename(tmp_path / "stage3")
    looks = [{"step": step, "held_out_loss": 1.0, "exact_match": share}
             for step, share in [(24, 0.89), (49, 0.9), (74, 0.98)]]
    for stage in STEPS:
        lines = [{"step": step, "loss": 1.0, "images_per_s": 2 * BATCH} for step in (0, 1)]
        lines += looks if stage == 3 else [{"step": 1, "held_out_loss": 1.0}]
        (tmp_path / f"stage{stage}").mkdir(exist_ok=True)
        (tmp_path / f"stage{stage}" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert result_of(tmp_path) == {
        "exact_match": 87.5, "noise": noise, "seconds": 3.0,
        "samples_to_90": BATCH * (STEPS[1] + STEPS[2] + 50),
        "parameters": n_parameters(model.connector)}


def test_the_races_table_has_mean_and_spread():
    def a_run(score, reached):
        noise = [{"score": score - 1, "cosine_distance": 0.25}] * len(NOISE)
        return {"exact_match": score, "noise": noise, "samples_to_90": reached,
                "parameters": 1234, "seconds": 60.0}

    runs = {"align": [a_run(90.0, 1600), a_run(81.0, None)], "mlp": [a_run(50.0, None)]}
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in race_table(runs).splitlines()]
    assert {len(line) for line in cells} == {len(NOISE) + 8}
    assert cells[2][:3] == ["align", "85.5 (81.0 to 90.0)", "84.5 (80.0 to 89.0)"]
    assert cells[2][-6:] == ["0.2500", "1,600, never", "1,234", "60", "58.81", "-1.67"]
    assert cells[3][:2] == ["mlp", "50.0"] and cells[3][-5] == "never"
