"""model.py against its equations: the decoder, packing, embed, the loss, and generation."""
import cmath
import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import model
from conftest import close, randomise, shapes
from model import (ALIGNVLM_PRESETS, IGNORE, IMAGE, LLAMA_PRESETS, AlignVLM, Llama, LlamaConfig,
                   goes_in_circles, sample_token)
from small_models import (LLAMAS, PROMPTS, SAMPLES, SCALED, STEPS, VISION, V, close_gradients,
                          generated, gradients_of, labelled, row_of, small_vlm)

# ------------------------------------------------------------------------------------------------
# The decoder


def test_from_scratch_a_projection_keeps_the_variance_of_its_input():
    """Those whose outputs are added to x are smaller by sqrt(2 n_layers); an embedding is about as
    long as one of 1 / D a number."""
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(vocab_size=400, hidden_size=128, n_layers=8, n_heads=4, n_kv_heads=2,
                            head_dim=40, intermediate_size=200, tie_embeddings=False))
    llm.init_weights()
    for name, W in llm.named_parameters():
        if W.ndim > 1 and "embed" not in name:
            y = torch.randn(500, W.shape[1]) @ W.T
            is_added = "o_proj" in name or "down_proj" in name
            assert y.std().item() == pytest.approx(1 / 4 if is_added else 1, rel=0.1), name
    lengths = llm.embed_tokens.weight.norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(1, rel=0.1)


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def naive_frequencies(config: LlamaConfig) -> list[float]:
    """Radians by which each pair turns from one position to the next: one wavelength at a time."""
    frequencies = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        shortest = config.rope_original_length / config.rope_high_freq_factor
        longest = config.rope_original_length / config.rope_low_freq_factor
        if wavelength > longest:
            frequency /= config.rope_factor
        elif wavelength > shortest:
            smooth = config.rope_original_length / wavelength - config.rope_low_freq_factor
            smooth /= config.rope_high_freq_factor - config.rope_low_freq_factor
            frequency = (1 - smooth) * frequency / config.rope_factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def naive_rotate(x: Tensor, frequencies: list[float]) -> Tensor:
    """One head x (L, head_dim): the pair (i, i + half) is a complex number that is turned."""
    half = x.shape[-1] // 2
    turns = [[cmath.exp(1j * position * frequency) for frequency in frequencies]
             for position in range(len(x))]
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([turned.real, turned.imag], dim=-1)


def naive_attention(config: LlamaConfig, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x (L, D) -> (L, D): head by head and position by position, each over its own past."""
    heads = []
    frequencies = naive_frequencies(config)
    for head in range(config.n_heads):
        q_rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        shared = head // (config.n_heads // config.n_kv_heads)
        rows = slice(shared * config.head_dim, (shared + 1) * config.head_dim)
        q = naive_rotate(x @ p[f"{name}.q_proj.weight"][q_rows].T, frequencies)
        k = naive_rotate(x @ p[f"{name}.k_proj.weight"][rows].T, frequencies)
        v = x @ p[f"{name}.v_proj.weight"][rows].T
        mixed = []
        for i in range(len(x)):
            e = (k[:i + 1] @ q[i] / config.head_dim ** 0.5).exp()
            mixed.append((e / e.sum()) @ v[:i + 1])
        heads.append(torch.stack(mixed))                            # (L, head_dim)
    return torch.cat(heads, dim=-1) @ p[f"{name}.o_proj.weight"].T


def naive_llama(config: LlamaConfig, p: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """tokens (L,) -> logits (L, V), with the parameters p by name."""
    eps = config.rms_norm_eps
    x = torch.stack([p["embed_tokens.weight"][i] for i in tokens])
    for n in range(config.n_layers):
        layer = f"layers.{n}"
        normed = naive_rms_norm(x, p[f"{layer}.input_layernorm.weight"], eps)
        x = x + naive_attention(config, p, f"{layer}.self_attn", normed)
        normed = naive_rms_norm(x, p[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = normed @ p[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ p[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ p[f"{layer}.mlp.down_proj.weight"].T
    head = p["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return naive_rms_norm(x, p["norm.weight"], eps) @ head.T


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_equals_its_equations(name):
    """Logits and the gradients of every parameter, against sums in fp64."""
    config, B, L = LLAMAS[name]
    ours = randomise(Llama(config))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (B, L), generator=generator)
    logits = ours(tokens)
    p = {name: p.detach().double().requires_grad_() for name, p in ours.named_parameters()}
    expected = torch.stack([naive_llama(config, p, row) for row in tokens])
    close(logits.double(), expected)
    g = torch.randn(logits.shape, generator=generator)
    (logits * g).sum().backward()
    (expected * g).sum().backward()
    close_gradients({name: p.grad.double() for name, p in ours.named_parameters()},
                    {name: p.grad for name, p in p.items()}, alone=L == 1)


@pytest.mark.parametrize("preset", ALIGNVLM_PRESETS)
def test_alignvlm_preset_is_its_three_parts(preset):
    """Names of the whole: vision., connector., llm. and the released names.

    W2 is (V, D), and the LLM's head is its own.
    """
    config = ALIGNVLM_PRESETS[preset]
    with torch.device("meta"):
        vlm, llm = AlignVLM(config), Llama(LLAMA_PRESETS[preset])
    d, D, V = vlm.vision.config.hidden_size, llm.config.hidden_size, llm.config.vocab_size
    connector = {"W1.weight": (D, d), "norm_D.weight": (D,), "norm_D.bias": (D,),
                 "W2.weight": (V, D), "norm_V.weight": (V,), "norm_V.bias": (V,)}
    parts = {"vision": shapes(vlm.vision), "connector": connector, "llm": shapes(llm)}
    assert shapes(vlm) == {f"{part}.{name}": shape for part, tensors in parts.items()
                           for name, shape in tensors.items()}
    assert vlm.vision.config.image_size == (112 if preset == "toy" else 384)


# ------------------------------------------------------------------------------------------------
# AlignVLM: embed, packing, the loss


def naive_embed(vlm: AlignVLM, tokens: Tensor, pixels: Tensor) -> Tensor:
    """Position by position; each tile goes through the encoder alone."""
    E_text = vlm.llm.embed_tokens.weight
    F_align = [vlm.connector(vlm.vision(page[None]), E_text)[0] for page in pixels]
    visual = iter([row for page in F_align for row in page])
    rows = []
    for row in tokens:
        rows.append(torch.stack([next(visual) if i == IMAGE else E_text[i] for i in row]))
    assert next(visual, None) is None
    return torch.stack(rows)


def test_embed_puts_visual_tokens_in_their_places():
    vlm = small_vlm()
    tokens = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(2))
    tokens[0, 3:7] = IMAGE          # two images apart, then one split, then none
    tokens[0, 11:15] = IMAGE
    tokens[1, 0] = IMAGE
    tokens[1, 14:] = IMAGE
    pixels = torch.randn(3, 3, 9, 9)
    H = vlm.embed(tokens, pixels)
    close(H, naive_embed(vlm, tokens, pixels))
    text = tokens != IMAGE
    assert torch.equal(H[text], vlm.llm.embed_tokens.weight[tokens[text]])
    assert torch.equal(vlm.embed(tokens[2:], pixels[:0]), H[2:])


@pytest.mark.parametrize("positions, tiles",
                         [(3, 1), (5, 1), (4, 2), (8, 1), (0, 1), (4, 0), (1, 0)])
def test_embed_refuses_a_wrong_count(positions, tiles):
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    tokens[0, :positions] = IMAGE
    n_visual = tiles * VISION.n_patches
    message = f"{positions} image positions for {n_visual} visual tokens"
    with pytest.raises(ValueError, match=message):
        small_vlm().embed(tokens, torch.zeros(tiles, 3, 9, 9))


def test_a_model_in_bf16_takes_the_same_samples():
    """As a saved folder is read: pack_row's pixels are fp32, the weights are not. The loss is the
    same up to bf16's eight bits."""
    vlm = small_vlm()
    row = row_of(SAMPLES)
    with torch.no_grad():
        wide, narrow = vlm(*row), vlm.to(torch.bfloat16)(*row)
    assert row[2].dtype == torch.float32 and narrow.dtype == torch.float32
    assert narrow != wide
    assert narrow.item() == pytest.approx(wide.item(), rel=0.02)


def naive_loss(vlm: AlignVLM) -> Tensor:
    """Of SAMPLES: each as cross-entropy of all its logits, by a loop."""
    total = 0.0
    for tokens, pixels in SAMPLES:
        h = vlm.llm.hidden(naive_embed(vlm, tokens[None], pixels))
        log_p = vlm.llm.logits(h)[0].log_softmax(-1)
        for position, label in enumerate(labelled(tokens).tolist()):
            if label != IGNORE:
                total = total - log_p[position, label]
    return total


@pytest.mark.parametrize("llm", [dict(), dict(tie_embeddings=True, head_dim=10),
                                 dict(n_heads=3, n_kv_heads=1, head_dim=24, **SCALED)],
                         ids=["untied", "tied", "MQA, scaled"])
def test_packed_equals_one_by_one_and_the_full_logits(llm):
    """Loss and gradients: of the packed row, of its samples one by one, and of naive_loss."""
    def learn(loss_of):
        vlm = small_vlm(**llm)
        loss = loss_of(vlm)
        loss.backward()
        return loss, gradients_of(vlm)

    packed, packed_gradients = learn(lambda vlm: vlm(*row_of(SAMPLES)))
    apart, apart_gradients = learn(lambda vlm: sum(vlm(*row_of([s])) for s in SAMPLES))
    full, full_gradients = learn(naive_loss)
    assert packed.dtype == torch.float32 and packed.shape == ()
    close(packed, apart)
    close_gradients(packed_gradients, apart_gradients)
    close(packed, full)
    close_gradients(packed_gradients, full_gradients)


def test_the_loss_of_a_model_in_bf16_is_fp32():
    """Summed in bf16 it would be off by a hundredth."""
    vlm = small_vlm().bfloat16()
    tokens, labels, pixels, lengths = row_of(SAMPLES)
    pixels = pixels.bfloat16()
    loss = vlm(tokens, labels, pixels, lengths)
    h = vlm.llm.hidden(vlm.embed(tokens, pixels), lengths)[0, labels[0] != IGNORE]
    logits = vlm.llm.logits(h).double()
    exact = nnf.cross_entropy(logits, labels[labels != IGNORE], reduction="sum")
    assert loss.dtype == torch.float32
    close(loss.double(), exact, 1e-6)


@pytest.mark.parametrize("changed", range(len(SAMPLES)))
def test_packed_samples_do_not_see_each_other(changed):
    """A new sample of the same shape in one's place changes nothing of the others.

    And no gradient crosses over.
    """
    vlm = small_vlm()

    def hidden(samples):
        tokens, _, pixels, lengths = row_of(samples)
        x = vlm.embed(tokens, pixels).detach().requires_grad_()
        return x, vlm.llm.hidden(x, lengths).split(lengths, dim=1)

    tokens, pixels = SAMPLES[changed]
    others = list(SAMPLES)
    others[changed] = torch.where(tokens == IMAGE, IMAGE, (tokens + 1) % V), pixels + 1
    _, before = hidden(SAMPLES)
    x, after = hidden(others)
    for i, (a, b) in enumerate(zip(before, after)):
        assert torch.equal(a, b) == (i != changed)
    after[changed].square().sum().backward()
    parts = x.grad.split([len(tokens) for tokens, _ in SAMPLES], dim=1)
    assert [bool(g.any()) for g in parts] == [i == changed for i in range(len(SAMPLES))]


def test_each_packed_sample_starts_at_position_0():
    """The 500th of 500 equal samples reads as the first.

    At position 20,000 the angles of RoPE are off by 1e-3.
    """
    vlm = small_vlm()
    x = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = vlm.llm.hidden(x.repeat(1, 500, 1), [40] * 500).view(500, 40, 24)
        close(h, vlm.llm.hidden(x).expand(500, -1, -1))


class Rows(TorchDispatchMode):
    """The most rows of any matrix product (..., V) that is computed while this is active."""

    def __init__(self, width: int):
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
        generated(vlm, texts, steps=3)
    assert all_of_them.most == row[0].numel()
    assert supervised.most == (row[1] != IGNORE).sum() < row[0].numel()
    assert sampled.most == len(texts)


def test_the_loss_in_blocks_of_logits(monkeypatch):
    """The same loss and gradients as from all logits at once.

    There are never more of them, in the backward pass either.
    """
    vlm = small_vlm()
    tokens, labels, pixels, lengths = row_of(SAMPLES)
    supervised = labels[0] != IGNORE
    h = vlm.llm.hidden(vlm.embed(tokens, pixels), lengths)[0, supervised]
    expected = nnf.cross_entropy(h @ vlm.llm.head.T, labels[0, supervised], reduction="sum")
    expected.backward()
    expected_gradients = gradients_of(vlm)
    vlm.zero_grad()
    monkeypatch.setattr(model, "LOGITS", 3 * V + 1)
    with Rows(V) as most:
        vlm(*row_of([s for s in SAMPLES if not len(s[1])])).backward()
    assert most.most == 3
    vlm.zero_grad()
    loss = vlm(tokens, labels, pixels, lengths)
    close(loss, expected.detach(), 1e-6)
    loss.backward()
    close_gradients(gradients_of(vlm), expected_gradients)


# ------------------------------------------------------------------------------------------------
# Generation


def without_cache(vlm: AlignVLM, tokens: Tensor, pixels: Tensor) -> list[int]:
    """Greedy decoding that reads the whole sequence again for every token."""
    new = []
    for _ in range(STEPS):
        sequence = torch.cat([tokens, torch.tensor(new, dtype=torch.int64)])[None]
        h = vlm.llm.hidden(naive_embed(vlm, sequence, pixels))
        new.append(vlm.llm.logits(h)[0, -1].argmax().item())
    return new


DECODERS = {
    "GQA": dict(scale=3.0), "MHA": dict(scale=3.0, n_kv_heads=4, head_dim=10),
    "tied": dict(scale=0.3, tie_embeddings=True, n_layers=3),
    "in blocks": dict(scale=6.0, hidden_size=64, head_dim=16, intermediate_size=96),
    "MQA, scaled": dict(scale=3.0, n_kv_heads=1, head_dim=24, rope_factor=8.0,
                        rope_original_length=20),
}


@pytest.mark.parametrize("decoder", DECODERS)
@torch.inference_mode()
def test_generate_equals_decoding_without_a_cache(decoder):
    """One by one, and in batches of prompts of different lengths with 3, 2, 1 and no tiles."""
    vlm = small_vlm(**DECODERS[decoder])
    expected = [without_cache(vlm, *p) for p in PROMPTS]
    assert len({tuple(e) for e in expected}) == len(PROMPTS)        # no rut
    assert max(len(set(e)) for e in expected) > 3
    assert [generated(vlm, [p])[0] for p in PROMPTS] == expected
    assert generated(vlm, PROMPTS) == expected
    assert generated(vlm, PROMPTS[::-1]) == expected[::-1]
    text = [i for i, (_, pixels) in enumerate(PROMPTS) if not len(pixels)]
    assert generated(vlm, [PROMPTS[i] for i in text]) == [expected[i] for i in text]


@torch.inference_mode()
def test_cached_hidden_states_equal_uncached_ones():
    """The numbers behind the tokens: a padded batch is read, then continued token by token."""
    llm, lengths, steps = small_vlm().llm, [7, 1, 4], 6
    longest = max(lengths)
    x = torch.randn(3, longest + steps, 24)
    cache = llm.new_cache(3, longest + steps)
    # Rows 1 and 2 go on where their own prompts end: what lies beyond is padding.
    h = llm.hidden(x[:, :longest], None, cache, torch.arange(longest).expand(3, -1))
    own = [[h[b, n - 1]] for b, n in enumerate(lengths)]
    for step in range(steps):
        position = torch.tensor(lengths)[:, None] + step
        new = llm.hidden(x[:, -1 - step, None], None, cache, position)[:, 0]
        for b in range(3):
            own[b].append(new[b])
    for b, n in enumerate(lengths):
        sequence = torch.cat([x[b, :n], x[b, longest:].flip(0)])
        close(torch.stack(own[b]), llm.hidden(sequence[None])[0, n - 1:])


@torch.inference_mode()
def test_attention_reads_no_further_than_the_caches_reach():
    """new_cache, reach and grow: a step reads what is filled.

    What lies beyond plays no part.
    """
    llm = small_vlm().llm
    x = torch.randn(2, 9, 24)
    cache = llm.new_cache(2, 20)
    assert (cache.start, cache.length, cache.reach) == (0, 20, 20)
    cache.reach = 8
    llm.hidden(x[:, :8], None, cache, torch.arange(8).expand(2, -1))
    for beyond in (*cache.k, *cache.v):
        assert not beyond[:, :, 8:].any()
        beyond[:, :, 9:] = torch.nan
    cache.grow()
    assert cache.reach == 9
    close(llm.hidden(x[:, 8:], None, cache, torch.full((2, 1), 8))[:, 0], llm.hidden(x)[:, -1])


@pytest.mark.parametrize("n_prefix, room", [(1, 0), (5, 3), (37, 0), (37, 27)])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("decoder", ["GQA", "MQA, scaled"])
@torch.inference_mode()
def test_after_a_kept_prefix_the_tokens_are_those_of_the_whole(decoder, options, n_prefix, room):
    """Keys and values of what stands before every prompt, read once; of one row for all.

    The prefix serves more than once, and prompts of several lengths, down to one token. On a GPU
    the cache that it was kept in has more room than it fills.
    """
    llm = small_vlm(**DECODERS[decoder]).llm
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(V, (1, n_prefix), generator=generator)
    ends = [torch.randint(V, (n,), generator=generator) for n in (7, 1, 4)]
    prefix = llm.new_cache(1, n_prefix + room)
    prefix.reach = n_prefix
    llm.hidden(llm.embed_tokens(before), cache=prefix)
    kept = [x.clone() for x in (*prefix.k, *prefix.v)]
    said = set()
    for rows in (ends, ends[1:2], ends[:1]):
        lengths = [len(row) for row in rows]
        tokens = pad_sequence(rows, batch_first=True)                       # (B, L)
        after = list(llm.generate(llm.embed_tokens(tokens), lengths, {7}, STEPS, prefix=prefix,
                                  **options))
        whole = torch.cat([before.expand(len(rows), -1), tokens], dim=1)
        lengths = [n_prefix + n for n in lengths]
        assert after == list(llm.generate(llm.embed_tokens(whole), lengths, {7}, STEPS, **options))
        said |= {token for step in after for token in step}
    assert len(said) > 3, "a loop of few tokens shows little"
    assert all(torch.equal(x, y) for x, y in zip((*prefix.k, *prefix.v), kept))


@pytest.mark.parametrize("B", [1, 2])
@torch.inference_mode()
def test_a_decoding_step_is_one_graph(B):
    """On a GPU it is compiled: nothing in it may need the host, and all steps share one graph."""
    torch._dynamo.reset()
    llm, graphs = small_vlm().llm, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(llm.hidden, backend=count, fullgraph=True)
    x = torch.randn(B, 9, 24)
    caches = [llm.new_cache(B, 12) for _ in range(2)]
    for i, positions in enumerate([[[4], [7]], [[5], [8]], [[6], [9]]]):
        positions = torch.tensor(positions[:B])
        compiled = step(x[:, i:i + 1].clone(), None, caches[0], positions)
        close(compiled, llm.hidden(x[:, i:i + 1].clone(), None, caches[1], positions))
    assert len(graphs) == 1


def test_stop_tokens_end_each_row_by_itself():
    vlm = small_vlm(scale=3.0)
    free = generated(vlm, PROMPTS)
    for stop in ({free[0][4]}, {free[2][0]}, {free[1][3], free[4][7]}, set(range(V)), {V + 5}):
        expected = []
        for row in free:
            expected.append(row[:min([row.index(i) for i in stop if i in row], default=STEPS)])
        assert generated(vlm, PROMPTS, stop) == expected
    # As soon as all have stopped there is nothing more to yield.
    tokens, pixels = PROMPTS[0]
    steps = list(vlm.generate([tokens], [pixels], {free[0][4]}, STEPS))
    assert len(steps) == free[0].index(free[0][4])


@pytest.mark.parametrize("ids, is_one", [
    ([7] * 256, True), ([7] * 255, False), ([1, 2, 3] * 90, True), ([9, 9] + [1, 2] * 128, True),
    ([*range(64)] * 4, True), ([*range(65)] * 4, False), ([1, 2] * 127 + [1, 3], False),
    ([1, 2] * 128 + [5], False), ([*range(300)], False), ([], False)])
def test_what_goes_in_circles(ids, is_one):
    assert goes_in_circles(ids) == is_one


def test_an_answer_that_goes_in_circles_ends_there_and_the_others_go_on(monkeypatch):
    """A small random model soon repeats itself, one prompt earlier than another."""
    torch.manual_seed(3)
    llm = small_vlm(scale=3.0).llm
    x = torch.randn(4, 5, llm.config.hidden_size)
    lengths = [5, 3, 4, 5]
    free = list(zip(*llm.generate(x, lengths, set(), 120)))
    monkeypatch.setattr(model, "CIRCLES", 12)
    ended = list(zip(*llm.generate(x, lengths, set(), 120)))
    n = [sum(i is not None for i in row) for row in ended]
    assert len(set(n)) > 1 and min(n) < 120
    for row, alone, length in zip(ended, free, n):
        assert row[:length] == alone[:length]
        circles = [goes_in_circles(list(alone[:i])) for i in range(121)]
        assert length == (circles.index(True) if True in circles else 120)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_max_new_tokens(steps):
    vlm = small_vlm(scale=3.0)
    full = generated(vlm, PROMPTS)
    assert generated(vlm, PROMPTS, steps=steps) == [row[:steps] for row in full]


def test_generate_refuses_a_wrong_number_of_tiles():
    tokens, pixels = PROMPTS[0]
    for wrong in (pixels[:0], torch.cat([pixels, pixels])):
        with pytest.raises(ValueError, match="image positions"):
            next(small_vlm().generate([tokens], [wrong], set()))


def test_sampling_depends_on_its_seed_alone():
    vlm = small_vlm()
    torch.manual_seed(1)
    first = generated(vlm, PROMPTS, temperature=1.0, seed=3)
    torch.manual_seed(2)
    assert generated(vlm, PROMPTS, temperature=1.0, seed=3) == first
    assert generated(vlm, PROMPTS, temperature=1.0, seed=4) != first
    assert generated(vlm, PROMPTS, temperature=1.0, top_p=0.5, seed=3) != first
    greedy = generated(vlm, PROMPTS)
    assert generated(vlm, PROMPTS, temperature=1.0, top_p=1e-6, seed=3) == greedy != first
    assert generated(vlm, PROMPTS, temperature=1e-4, seed=3) == greedy


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.6),
                                                (1.0, 0.3), (0.7, 0.01)])
def test_sample_token_draws_from_the_smallest_set_that_holds_top_p(temperature, top_p):
    """Frequencies of 20,000 draws against the renormalised probabilities, found one by one."""
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -3.0],
                           [5.0, 0.0, 1.0, 2.0, -9.0, 0.5, 4.5]])
    draws, generator = 20_000, torch.Generator().manual_seed(0)
    ids = sample_token(logits.repeat(draws, 1), temperature, top_p, generator).view(draws, 2)
    for row in range(2):
        weights = [math.exp(x / temperature) for x in logits[row].tolist()]
        p = [w / sum(weights) for w in weights]
        kept, held = [], 0.0
        for i in sorted(range(len(p)), key=p.__getitem__, reverse=True):
            if held < top_p:
                kept.append(i)
                held += p[i]
        for i in range(len(p)):
            share = (ids[:, row] == i).float().mean().item()
            expected = p[i] / held if i in kept else 0.0
            # Five standard deviations of a share of `draws`; a token outside the set must not
            # come up once.
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5
