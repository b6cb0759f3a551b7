"""Llama against transformers, packing against one by one, embed against a loop, generate against no cache at all."""
import pytest
import torch
import torch.nn.functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import model
from conftest import close, n_parameters, randomise, shapes
from model import (ALIGNVLM_PRESETS, IGNORE, IMAGE, LLAMA_PRESETS, AlignVLM, AlignVLMConfig, KVCache, Llama, LlamaConfig,
                   attend, choose, rope)
from plumbing.fast import can_pack
from vision import SigLIPConfig

# ---------------------------------------------------------------------------------------------------------------------
# The decoder


def their_config(config: LlamaConfig) -> TheirConfig:
    scaling = {"rope_type": "default"} if config.rope_factor == 1 else {
        "rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_length}
    return TheirConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings, max_position_embeddings=131_072,
        rope_parameters={"rope_theta": config.rope_theta, **scaling}, attn_implementation="eager")


def hub_name(name: str) -> str:
    return name.removeprefix("model.")


def both(config: LlamaConfig) -> tuple[Llama, LlamaForCausalLM]:
    """The same random weights in both implementations."""
    theirs = randomise(LlamaForCausalLM(their_config(config))).eval()
    ours = Llama(config)
    ours.load_state_dict({hub_name(k): p.detach() for k, p in theirs.named_parameters()})   # a tied head is no parameter
    return ours, theirs


def small(**changes) -> LlamaConfig:
    return LlamaConfig(**{**dict(vocab_size=37, hidden_size=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6,
                                 intermediate_size=40, rope_theta=10_000.0, rope_factor=1.0, tie_embeddings=False),
                          **changes})


# An original length of 64 puts the wavelengths of head_dim 24 (6 to 29,000) into all three ranges: under 16, over 64,
# between.
SCALED = dict(rope_factor=8.0, rope_original_length=64)
CASES = {
    "round":               (small(hidden_size=32, head_dim=8), 2, 16),
    "GQA 1":               (small(n_heads=3, n_kv_heads=3), 2, 9),
    "GQA 2":               (small(), 3, 11),
    "GQA 3":               (small(n_heads=6, n_kv_heads=2), 2, 7),
    "MQA":                 (small(hidden_size=25, n_heads=5, n_kv_heads=1), 2, 13),
    "one head":            (small(n_heads=1, n_kv_heads=1, head_dim=24), 1, 10),
    "head_dim 10":         (small(head_dim=10), 2, 12),
    "head_dim 2":          (small(head_dim=2), 2, 12),
    "odd everything":      (small(vocab_size=31, hidden_size=15, n_layers=3, n_heads=3, n_kv_heads=1, head_dim=14,
                                  intermediate_size=19, rms_norm_eps=1e-2), 3, 5),
    "tied":                (small(tie_embeddings=True), 2, 11),
    "one token":           (small(), 2, 1),
    "scaled":              (small(head_dim=24, **SCALED), 1, 150),
    "scaled, tied, MQA":   (small(head_dim=24, n_kv_heads=1, tie_embeddings=True, **SCALED), 2, 131),
    "scaled, other knobs": (small(head_dim=24, rope_factor=3.0, rope_low_freq_factor=2.0, rope_high_freq_factor=5.0,
                                  rope_original_length=100, rope_theta=500.0), 1, 140),
    "scaled, head_dim 10": (small(head_dim=10, n_heads=6, **SCALED), 1, 90),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_equals_transformers(name):
    config, B, L = CASES[name]
    ours, theirs = both(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (B, L), generator=generator)
    logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.shape == (B, L, config.vocab_size)
    close(logits, expected)

    g = torch.randn(logits.shape, generator=generator)
    (logits * g).sum().backward()
    (expected * g).sum().backward()
    their_grads = {hub_name(k): p.grad for k, p in theirs.named_parameters()}
    assert their_grads.keys() == dict(ours.named_parameters()).keys()
    for k, p in ours.named_parameters():
        if L == 1 and ("q_proj" in k or "k_proj" in k):
            # One token attends to itself whatever q and k are: rounding noise, measured against the values' gradient.
            values = their_grads[k.replace("q_proj", "v_proj").replace("k_proj", "v_proj")]
            close(p.grad, torch.zeros_like(p), scale=values.abs().max().item())
        else:
            close(p.grad, their_grads[k])


def test_llama_on_embeddings_equals_transformers():
    ours, theirs = both(small(head_dim=10))
    x = torch.randn(2, 9, 24)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits, expected = ours(embeddings=our_x), theirs(inputs_embeds=their_x).logits
    close(logits, expected)
    g = torch.randn_like(logits)
    (logits * g).sum().backward()
    (expected * g).sum().backward()
    close(our_x.grad, their_x.grad)


# The released config.json files, written out.
COMMON = dict(vocab_size=128_256, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131_072)
RELEASED = {
    "llama-3.2-1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
                         intermediate_size=8192, tie_word_embeddings=True),
    "llama-3.2-3b": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
                         intermediate_size=8192, tie_word_embeddings=True),
    "llama-3.1-8b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
                         intermediate_size=14_336, tie_word_embeddings=False),
}
FACTOR = {"llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0, "llama-3.1-8b": 8.0}
SIZE = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248}


def released(preset: str) -> TheirConfig:
    return TheirConfig(**COMMON, **RELEASED[preset], rope_parameters=dict(
        rope_type="llama3", rope_theta=500_000.0, factor=FACTOR[preset], low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192))


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_preset_has_the_released_parameters(preset):
    config = their_config(LLAMA_PRESETS[preset]) if preset == "toy" else released(preset)
    with torch.device("meta"):
        ours, theirs = Llama(LLAMA_PRESETS[preset]), LlamaForCausalLM(config)
    expected = {hub_name(k): s for k, s in shapes(theirs).items()}
    if config.tie_word_embeddings:      # the released files of a tied model hold no head either
        assert expected.pop("lm_head.weight") == expected["embed_tokens.weight"]
    assert shapes(ours) == expected
    assert n_parameters(ours) == n_parameters(theirs) == SIZE.get(preset, n_parameters(theirs))
    assert LLAMA_PRESETS[preset].rms_norm_eps == config.rms_norm_eps


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_preset_turns_q_and_k_as_transformers(preset):
    """Up to the last position: an angle of 100,000 radians shows every rounding of its frequency."""
    config = their_config(LLAMA_PRESETS[preset]) if preset == "toy" else released(preset)
    positions = torch.tensor([[0, 1, 2, 100, 2047, 7290, 8191, 8192, 40_000, 131_071]])
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin = rope(positions, LLAMA_PRESETS[preset])
    half = config.head_dim // 2
    close(cos[:, 0], expected_cos)
    close(sin[:, 0, :, half:], expected_sin[..., half:])
    close(sin[:, 0, :, :half], -expected_sin[..., :half])


@pytest.mark.parametrize("preset", ALIGNVLM_PRESETS)
def test_alignvlm_preset_is_its_three_parts(preset):
    """Names of the whole: vision., connector., llm. and the released names; W2 is (V, D) and the LLM's head its own."""
    config = ALIGNVLM_PRESETS[preset]
    with torch.device("meta"):
        vlm, llm = AlignVLM(config), Llama(LLAMA_PRESETS[preset])
    d, D, V = vlm.vision.config.hidden_size, llm.config.hidden_size, llm.config.vocab_size
    connector = {"W1.weight": (D, d), "norm_D.weight": (D,), "norm_D.bias": (D,),
                 "W2.weight": (V, D), "norm_V.weight": (V,), "norm_V.bias": (V,)}
    assert shapes(vlm) == {**{f"vision.{k}": s for k, s in shapes(vlm.vision).items()},
                           **{f"connector.{k}": s for k, s in connector.items()},
                           **{f"llm.{k}": s for k, s in shapes(llm).items()}}
    assert vlm.vision.config.image_size == (112 if preset == "toy" else 384)


# ---------------------------------------------------------------------------------------------------------------------
# AlignVLM: embed, packing, the loss

VISION = SigLIPConfig(hidden_size=12, n_layers=1, n_heads=2, intermediate_size=20, image_size=9, patch_size=4)   # N = 4
V = 41


def small_vlm(seed=0, spread=1.0, **llm) -> AlignVLM:
    """`spread` scales the words against what the layers add: decoding must not fall into one repeated token."""
    vlm = randomise(AlignVLM(AlignVLMConfig(VISION, small(vocab_size=V, **llm))), seed).eval()
    with torch.no_grad():
        vlm.llm.embed_tokens.weight.mul_(spread)
    return vlm


def prompt(seed, tiles, words):
    """One sample: a word, its tiles' places, more words. -> tokens (L,), pixels (T, 3, S, S)"""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (words,), generator=generator)
    image = torch.full((tiles * VISION.n_patches,), IMAGE)
    pixels = torch.randn(tiles, 3, VISION.image_size, VISION.image_size, generator=generator)
    return torch.cat([text[:1], image, text[1:]]), pixels


def labelled(tokens):
    """Every word after the first two is an answer, except each third."""
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    labels[:2], labels[::3], labels[labels == IMAGE] = IGNORE, IGNORE, IGNORE
    return labels


SAMPLES = [prompt(1, 1, 9), prompt(2, 0, 5), prompt(3, 3, 12), prompt(4, 0, 14), prompt(5, 2, 7)]


def row_of(samples):
    return (torch.cat([t for t, _ in samples])[None], torch.cat([labelled(t) for t, _ in samples])[None],
            torch.cat([p for _, p in samples]), [len(t) for t, _ in samples])


def naive_embed(vlm, tokens, pixels):
    """Position by position; each tile goes through the encoder alone."""
    E_text = vlm.llm.embed_tokens.weight
    visual = iter([f for page in pixels for f in vlm.connector(vlm.vision(page[None]), E_text)[0]])
    rows = [torch.stack([next(visual) if t == IMAGE else E_text[t] for t in row]) for row in tokens]
    assert next(visual, None) is None
    return torch.stack(rows)


def test_embed_puts_visual_tokens_in_their_places():
    vlm = small_vlm()
    tokens = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(2))
    tokens[0, 3:7] = tokens[0, 11:15] = IMAGE        # two images apart, then one split, then none
    tokens[1, 0], tokens[1, 14:] = IMAGE, IMAGE
    pixels = torch.randn(3, 3, 9, 9)
    H = vlm.embed(tokens, pixels)
    close(H, naive_embed(vlm, tokens, pixels))
    words = tokens != IMAGE
    assert torch.equal(H[words], vlm.llm.embed_tokens.weight[tokens[words]])
    assert torch.equal(vlm.embed(tokens[2:], pixels[:0]), H[2:])


@pytest.mark.parametrize("positions, tiles", [(3, 1), (5, 1), (4, 2), (8, 1), (0, 1), (4, 0), (1, 0)])
def test_embed_refuses_a_wrong_count(positions, tiles):
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    tokens[0, :positions] = IMAGE
    with pytest.raises(ValueError, match=f"{positions} image positions for {tiles * VISION.n_patches} visual tokens"):
        small_vlm().embed(tokens, torch.zeros(tiles, 3, 9, 9))


@pytest.mark.parametrize("llm", [dict(), dict(tie_embeddings=True, head_dim=10),
                                 dict(n_heads=3, n_kv_heads=1, head_dim=24, **SCALED)],
                         ids=["untied", "tied", "MQA, scaled"])
def test_packed_equals_one_by_one_and_the_full_logits(llm):
    """Loss and gradients: the packed row; its samples one by one; each as cross-entropy of all its logits, by a loop."""
    def gradients(loss_of):
        vlm = small_vlm(**llm)
        loss = loss_of(vlm)
        loss.backward()
        return loss, {k: p.grad for k, p in vlm.named_parameters()}

    def naive(vlm):
        total = 0.0
        for tokens, pixels in SAMPLES:
            log_p = vlm.llm(embeddings=naive_embed(vlm, tokens[None], pixels))[0].log_softmax(-1)
            for position, label in enumerate(labelled(tokens).tolist()):
                if label != IGNORE:
                    total = total - log_p[position, label]
        return total

    packed, packed_grads = gradients(lambda vlm: vlm(*row_of(SAMPLES)))
    apart, apart_grads = gradients(lambda vlm: sum(vlm(*row_of([s])) for s in SAMPLES))
    full, full_grads = gradients(naive)
    assert packed.dtype == torch.float32 and packed.shape == ()
    for loss, grads in ((apart, apart_grads), (full, full_grads)):
        close(packed, loss)
        for k in packed_grads:
            if k.endswith("k_proj.bias"):       # truly 0, see test_vision
                close(packed_grads[k], grads[k], scale=grads[k.replace("bias", "weight")].abs().max().item())
            else:
                close(packed_grads[k], grads[k])


@pytest.mark.parametrize("changed", range(len(SAMPLES)))
def test_packed_samples_do_not_see_each_other(changed):
    """A new sample in one's place, of the same shape, changes nothing of the others, and no gradient crosses over."""
    vlm = small_vlm()

    def hidden(samples):
        tokens, _, pixels, lengths = row_of(samples)
        x = vlm.embed(tokens, pixels).detach().requires_grad_()
        return x, vlm.llm.hidden(x, lengths).split(lengths, dim=1)

    tokens, pixels = SAMPLES[changed]
    other = torch.where(tokens == IMAGE, IMAGE, (tokens + 1) % V), pixels + 1
    _, before = hidden(SAMPLES)
    x, after = hidden([other if i == changed else s for i, s in enumerate(SAMPLES)])
    for i, (a, b) in enumerate(zip(before, after)):
        assert torch.equal(a, b) == (i != changed)
    after[changed].square().sum().backward()
    parts = x.grad.split([len(t) for t, _ in SAMPLES], dim=1)
    assert [bool(g.any()) for g in parts] == [i == changed for i in range(len(SAMPLES))]


def test_each_packed_sample_starts_at_position_0():
    """The 500th of 500 equal samples reads as the first; at position 20,000 the angles of RoPE are off by 1e-3."""
    vlm = small_vlm()
    x = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = vlm.llm.hidden(x.repeat(1, 500, 1), [40] * 500).view(500, 40, 24)
        close(h, vlm.llm.hidden(x).expand(500, -1, -1))


class Rows(TorchDispatchMode):
    """The most rows of any matrix product (..., V) that is computed while this is active."""

    def __init__(self, width):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        product = any(name in str(function) for name in ("mm", "linear"))
        if product and out.shape[-1] == self.width:
            self.most = max(self.most, out.numel() // self.width)
        return out


def test_the_head_runs_only_where_a_token_is_needed():
    vlm = small_vlm()
    texts = [s for s in SAMPLES if not len(s[1])]       # no tiles: P_vocab has V columns too
    row = row_of(texts)
    with Rows(V) as all_of_them:
        vlm.llm(row[0])
    with Rows(V) as supervised:
        vlm(*row)
    with Rows(V) as sampled:
        list(vlm.generate([t for t, _ in texts], [p for _, p in texts], set(), max_new_tokens=3))
    assert all_of_them.most == row[0].numel()
    assert supervised.most == (row[1] != IGNORE).sum() < row[0].numel()
    assert sampled.most == len(texts)


def test_the_loss_in_blocks_of_logits(monkeypatch):
    """The same loss and gradients as from all logits at once; never more of them, in the backward pass either."""
    vlm, row = small_vlm(), row_of(SAMPLES)
    where = row[1][0] != IGNORE
    h = vlm.llm.hidden(vlm.embed(row[0], row[2]), row[3])[0, where]
    expected = nnf.cross_entropy(h @ vlm.llm.head.T, row[1][0, where], reduction="sum")
    gradients = torch.autograd.grad(expected, [*vlm.parameters()], allow_unused=True)
    monkeypatch.setattr(model, "LOGITS", 3 * V + 1)
    texts = row_of([s for s in SAMPLES if not len(s[1])])
    with Rows(V) as most:
        vlm(*texts).backward()
    assert most.most == 3
    vlm.zero_grad()
    loss = vlm(*row)
    close(loss, expected.detach(), 1e-6)
    loss.backward()
    for (name, p), g in zip(vlm.named_parameters(), gradients):
        if not name.endswith("k_proj.bias"):        # 0 in theory: rounding noise
            close(p.grad, g)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

STEPS = 12
PROMPTS = [*SAMPLES, prompt(6, 0, 1), prompt(7, 1, 1)]      # the last two: one word, and an image that ends the prompt


def generated(vlm, prompts, stop=frozenset(), steps=STEPS, **options):
    """generate's answers, one list a prompt; a row that has stopped must stay so."""
    rows = [[] for _ in prompts]
    for ids in vlm.generate([t for t, _ in prompts], [p for _, p in prompts], set(stop), steps, **options):
        assert len(ids) == len(prompts) and any(i is not None for i in ids)
        for row, i in zip(rows, ids):
            row.append(i)
    for row in rows:
        assert None not in row or all(i is None for i in row[row.index(None):])
    return [[i for i in row if i is not None] for row in rows]


def without_cache(vlm, tokens, pixels, steps=STEPS):
    """Greedy decoding that reads the whole sequence again for every token."""
    new = []
    for _ in range(steps):
        sequence = torch.cat([tokens, torch.tensor(new, dtype=torch.int64)])[None]
        logits = vlm.llm(embeddings=naive_embed(vlm, sequence, pixels))
        new.append(logits[0, -1].argmax().item())
    return new


DECODERS = {"GQA": dict(spread=3.0), "MHA": dict(spread=3.0, n_kv_heads=4, head_dim=10),
            "tied": dict(spread=0.3, tie_embeddings=True, n_layers=3),
            "in blocks": dict(spread=6.0, hidden_size=64, head_dim=16, intermediate_size=96),
            "MQA, scaled": dict(spread=3.0, n_kv_heads=1, head_dim=24, rope_factor=8.0, rope_original_length=20)}


@pytest.mark.parametrize("decoder", DECODERS)
@torch.inference_mode()
def test_generate_equals_decoding_without_a_cache(decoder):
    """One by one, and in batches of prompts of different lengths with 3, 2, 1 and no tiles."""
    vlm = small_vlm(**DECODERS[decoder])
    expected = [without_cache(vlm, *p) for p in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(PROMPTS) and max(len(set(e)) for e in expected) > 3   # no rut
    assert [generated(vlm, [p])[0] for p in PROMPTS] == expected
    assert generated(vlm, PROMPTS) == expected
    assert generated(vlm, PROMPTS[::-1]) == expected[::-1]
    text = [i for i, (_, pixels) in enumerate(PROMPTS) if not len(pixels)]
    assert generated(vlm, [PROMPTS[i] for i in text]) == [expected[i] for i in text]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packed_weights_give_the_same_tokens(tied, dtype):
    """One by one and in a batch; but for bf16 no matrices are packed, and E_text never."""
    vlm = small_vlm(tie_embeddings=tied, hidden_size=64, head_dim=32).to(dtype)
    E_text, prompts = vlm.llm.embed_tokens.weight, [(p[0], p[1].to(dtype)) for p in PROMPTS]
    expected = [generated(vlm, [p])[0] for p in prompts]
    for _ in range(2):
        vlm.llm.pack()
    assert [generated(vlm, [p])[0] for p in prompts] == expected == generated(vlm, prompts)
    assert vlm.llm.embed_tokens.weight is E_text and not E_text.is_mkldnn
    assert vlm.llm.head.is_mkldnn == vlm.llm.layers[0].mlp.up_proj.weight.is_mkldnn == can_pack(E_text)


@pytest.mark.parametrize("amx", [True, False])
def test_attention_is_in_bf16_only_where_that_is_faster(amx, monkeypatch):
    """On a CPU: to read a prompt, where AMX multiplies; the result is the same up to bf16's rounding."""
    monkeypatch.setattr(model, "AMX", amx)
    q, k, v = (torch.randn(2, heads, 9, 16).bfloat16() for heads in (4, 2, 2))
    later = torch.full((9, 9), -torch.inf).triu(1)
    dtypes, real = [], nnf.scaled_dot_product_attention
    monkeypatch.setattr(nnf, "scaled_dot_product_attention", lambda *x, **kw: dtypes.append(x[0].dtype) or real(*x, **kw))
    expected = real(q.float(), k.float(), v.float(), later, enable_gqa=True)
    learning = attend(q, k, v, is_causal=True)
    with torch.no_grad():
        for y in learning, attend(q, k, v, is_causal=True), attend(q, k.float(), v.float(), later):
            assert y.dtype == torch.bfloat16
            close(y.float(), expected, 1e-2)
    assert dtypes == [torch.float32, torch.bfloat16 if amx else torch.float32, torch.float32]


@torch.inference_mode()
def test_cached_hidden_states_equal_uncached_ones():
    """The numbers behind the tokens: a padded batch is read, then continued one token at a time."""
    vlm = small_vlm()
    lengths, steps = [7, 1, 4], 6
    x = torch.randn(3, max(lengths) + steps, 24)
    cache = KVCache(vlm.llm.config, 3, max(lengths) + steps, x.device, x.dtype)
    prefix = x[:, :max(lengths)]        # rows 1 and 2 go on where their own prompts end: what lies beyond is padding
    positions = torch.arange(max(lengths)).expand(3, -1)
    h = vlm.llm.hidden(prefix, None, cache, positions)
    own = [[h[b, n - 1]] for b, n in enumerate(lengths)]
    for step in range(steps):
        position = torch.tensor(lengths)[:, None] + step
        new = vlm.llm.hidden(torch.stack([x[b, -1 - step] for b in range(3)])[:, None], None, cache, position)[:, 0]
        for b in range(3):
            own[b].append(new[b])
    for b, n in enumerate(lengths):
        sequence = torch.cat([x[b, :n], torch.stack([x[b, -1 - step] for step in range(steps)])])
        close(torch.stack(own[b]), vlm.llm.hidden(sequence[None])[0, n - 1:])


@pytest.mark.parametrize("B", [1, 2])
@torch.inference_mode()
def test_a_decoding_step_is_one_graph(B):
    """On a GPU it is compiled: nothing in it may need the host, and all steps share one graph."""
    torch._dynamo.reset()
    vlm, graphs = small_vlm(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(vlm.llm.hidden, backend=count, fullgraph=True)
    x, caches = torch.randn(B, 9, 24), [KVCache(vlm.llm.config, B, 12, "cpu", torch.float32) for _ in range(2)]
    for i, position in enumerate([[[4], [7]], [[5], [8]], [[6], [9]]]):
        compiled, eager = (hidden(x[:, i:i + 1].clone(), None, cache, torch.tensor(position[:B]))
                           for hidden, cache in zip((step, vlm.llm.hidden), caches))
        close(compiled, eager)
    assert len(graphs) == 1


def test_greedy_text_equals_transformers_generate():
    config = small(vocab_size=V, n_layers=3, head_dim=10, n_heads=6)
    vlm, theirs = AlignVLM(AlignVLMConfig(VISION, config)).eval(), randomise(LlamaForCausalLM(their_config(config))).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.mul_(3.0)
    vlm.llm.load_state_dict({hub_name(k): p.detach() for k, p in theirs.named_parameters()})
    texts = [prompt(seed, 0, words) for seed, words in ((8, 1), (9, 6), (10, 19))]
    expected = [theirs.generate(t[None], attention_mask=torch.ones_like(t[None]), do_sample=False, max_new_tokens=20,
                                eos_token_id=None, pad_token_id=0)[0, len(t):].tolist() for t, _ in texts]
    assert len(set(expected[0])) > 3
    assert generated(vlm, texts, steps=20) == expected


def test_stop_tokens_end_each_row_by_itself():
    vlm = small_vlm(spread=3.0)
    free = generated(vlm, PROMPTS)
    for stop in ({free[0][4]}, {free[2][0]}, {free[1][3], free[4][7]}, set(range(V)), {V + 5}):
        expected = [row[:min([row.index(s) for s in stop if s in row], default=STEPS)] for row in free]
        assert generated(vlm, PROMPTS, stop) == expected
    # As soon as all have stopped there is nothing more to yield.
    assert len(list(vlm.generate([PROMPTS[0][0]], [PROMPTS[0][1]], {free[0][4]}, STEPS))) == free[0].index(free[0][4])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_max_new_tokens(steps):
    vlm = small_vlm(spread=3.0)
    assert generated(vlm, PROMPTS, steps=steps) == [row[:steps] for row in generated(vlm, PROMPTS)]


def test_generate_refuses_a_wrong_number_of_tiles():
    tokens, pixels = PROMPTS[0]
    for wrong in (pixels[:0], torch.cat([pixels, pixels])):
        with pytest.raises(ValueError, match="image positions"):
            next(small_vlm().generate([tokens], [wrong], set()))


def test_sampling_depends_on_its_seed_alone():
    vlm = small_vlm()
    draw = lambda **options: generated(vlm, PROMPTS, **options)
    torch.manual_seed(1)
    first = draw(temperature=1.0, seed=3)
    torch.manual_seed(2)
    assert draw(temperature=1.0, seed=3) == first
    assert draw(temperature=1.0, seed=4) != first
    assert draw(temperature=1.0, top_p=0.5, seed=3) != first
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw(temperature=1e-4, seed=3) == draw() != first


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.6), (1.0, 0.3), (0.7, 0.01)])
def test_choose_draws_from_the_smallest_set_that_holds_top_p(temperature, top_p):
    """Frequencies of 20,000 draws against the renormalised probabilities, found one word after the other."""
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -3.0], [5.0, 0.0, 1.0, 2.0, -9.0, 0.5, 4.5]])
    draws = 20_000
    ids = choose(logits.repeat(draws, 1), temperature, top_p, torch.Generator().manual_seed(0)).view(draws, 2)
    for row in range(2):
        weights = [2.718281828459045 ** (x / temperature) for x in logits[row].tolist()]
        p = [w / sum(weights) for w in weights]
        kept, held = [], 0.0
        while held < top_p and len(kept) < len(p):
            kept.append(max((i for i in range(len(p)) if i not in kept), key=p.__getitem__))
            held += p[kept[-1]]
        for i in range(len(p)):
            share, expected = (ids[:, row] == i).float().mean().item(), p[i] / held if i in kept else 0.0
            # Five standard deviations of a share of `draws`; a word outside the set must not come up once.
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5, (i, share, expected)
