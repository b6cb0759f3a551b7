"""model.py's decoder against transformers' LlamaForCausalLM."""
import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conftest import close, n_parameters, randomise, shapes
from model import LLAMA_PRESETS, AlignVLM, AlignVLMConfig, Llama, LlamaConfig, rope
from small_models import (LLAMAS, VISION, V, close_gradients, generated, gradients_of, prompt,
                          small_llama)


def their_config(config: LlamaConfig) -> TheirConfig:
    rope_parameters = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_factor != 1:
        rope_parameters |= {"rope_type": "llama3", "factor": config.rope_factor,
                            "low_freq_factor": config.rope_low_freq_factor,
                            "high_freq_factor": config.rope_high_freq_factor,
                            "original_max_position_embeddings": config.rope_original_length}
    return TheirConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings, max_position_embeddings=131_072,
        rope_parameters=rope_parameters, attn_implementation="eager")


def hub_name(name: str) -> str:
    return name.removeprefix("model.")


def both(config: LlamaConfig) -> tuple[Llama, LlamaForCausalLM]:
    """The same random weights in both implementations."""
    theirs = randomise(LlamaForCausalLM(their_config(config))).eval()
    ours = Llama(config)
    # A tied head is no parameter.
    ours.load_state_dict({hub_name(name): p.detach() for name, p in theirs.named_parameters()})
    return ours, theirs


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_equals_transformers(name):
    config, B, L = LLAMAS[name]
    ours, theirs = both(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (B, L), generator=generator)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.shape == (B, L, config.vocab_size)
    close(logits, expected)
    g = torch.randn(logits.shape, generator=generator)
    (logits * g).sum().backward()
    (expected * g).sum().backward()
    their_gradients = {hub_name(name): p.grad for name, p in theirs.named_parameters()}
    close_gradients(gradients_of(ours), their_gradients, alone=L == 1)


def test_llama_on_embeddings_equals_transformers():
    ours, theirs = both(small_llama(head_dim=10))
    x = torch.randn(2, 9, 24)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits = ours.logits(ours.hidden(our_x))
    expected = theirs(inputs_embeds=their_x).logits
    close(logits, expected)
    g = torch.randn_like(logits)
    (logits * g).sum().backward()
    (expected * g).sum().backward()
    close(our_x.grad, their_x.grad)


# The released config.json files, written out.
RELEASED = {
    "llama-3.2-1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                         head_dim=64, intermediate_size=8192, tie_word_embeddings=True),
    "llama-3.2-3b": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24,
                         head_dim=128, intermediate_size=8192, tie_word_embeddings=True),
    "llama-3.1-8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                         head_dim=128, intermediate_size=14_336, tie_word_embeddings=False),
}
FACTOR = {"llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0, "llama-3.1-8b": 8.0}
SIZE = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248}


def released(preset: str) -> TheirConfig:
    """Of the toy, which was never released, transformers' configuration of the same sizes."""
    if preset == "toy":
        return their_config(LLAMA_PRESETS["toy"])
    return TheirConfig(
        vocab_size=128_256, num_key_value_heads=8, rms_norm_eps=1e-5,
        max_position_embeddings=131_072, **RELEASED[preset], rope_parameters=dict(
            rope_type="llama3", rope_theta=500_000.0, factor=FACTOR[preset], low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=8192))


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_preset_has_the_released_parameters(preset):
    config = released(preset)
    with torch.device("meta"):
        ours, theirs = Llama(LLAMA_PRESETS[preset]), LlamaForCausalLM(config)
    expected = {hub_name(name): shape for name, shape in shapes(theirs).items()}
    if config.tie_word_embeddings:      # the released files of a tied model hold no head either
        assert expected.pop("lm_head.weight") == expected["embed_tokens.weight"]
    assert shapes(ours) == expected
    assert n_parameters(ours) == n_parameters(theirs) == SIZE.get(preset, n_parameters(theirs))
    assert LLAMA_PRESETS[preset].rms_norm_eps == config.rms_norm_eps


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_preset_turns_q_and_k_as_transformers(preset):
    """Up to the last position.

    An angle of 100,000 radians shows every rounding of its frequency.
    """
    config = released(preset)
    positions = torch.tensor([[0, 1, 2, 100, 2047, 7290, 8191, 8192, 40_000, 131_071]])
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin = rope(positions, LLAMA_PRESETS[preset])
    half = config.head_dim // 2
    close(cos[:, 0], expected_cos)
    close(sin[:, 0, :, half:], expected_sin[..., half:])
    close(sin[:, 0, :, :half], -expected_sin[..., :half])


def test_greedy_text_equals_transformers_generate():
    config = small_llama(vocab_size=V, n_layers=3, head_dim=10, n_heads=6)
    vlm = AlignVLM(AlignVLMConfig(VISION, config)).eval()
    vlm.llm, theirs = both(config)
    with torch.no_grad():
        vlm.llm.embed_tokens.weight.mul_(3.0)
        theirs.model.embed_tokens.weight.mul_(3.0)
    texts = [prompt(8, 0, 1), prompt(9, 0, 6), prompt(10, 0, 19)]
    expected = []
    for tokens, _ in texts:
        out = theirs.generate(tokens[None], attention_mask=torch.ones_like(tokens[None]),
                              do_sample=False, max_new_tokens=20, eos_token_id=None,
                              pad_token_id=0)
        expected.append(out[0, len(tokens):].tolist())
    assert len(set(expected[0])) > 3
    assert generated(vlm, texts, steps=20) == expected
