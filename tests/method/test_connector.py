"""Align against equations 1 and 2 written out, and what the paper says of it: convex, from the LM head, on live words."""
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import connector
from conftest import close, randomise
from connector import Align, AlignTopK, Mixture, blocks, spread
from paper.align_vocab import ALIGN_VOCAB, choose_align_vocab, choose_words, use_align_vocab
from plumbing.settings import CheckpointError, InputError
from model import IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig
from vision import SigLIPConfig

# (leading dimensions, d, D, V). No d of 1 or D of 2: a LayerNorm's output is then +-1 and F's gradient pure rounding.
SHAPES = [((2, 4), 8, 16, 32), ((3, 5), 7, 11, 13), ((1, 1), 3, 4, 5), ((), 6, 5, 29), ((2, 3, 2), 9, 4, 101),
          ((7,), 2, 6, 3)]


def inputs(shape, d, D, V, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    align = randomise(Align(d, D, V).to(dtype))
    F = torch.randn(*shape, d, generator=generator, dtype=dtype)
    E_text = torch.randn(V, D, generator=generator, dtype=dtype)
    return align, F, E_text, generator


def naive_layer_norm(x, weight, bias):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5) ** 0.5 * weight + bias


def naive_p_vocab(F, W1, W2, weight_D, bias_D, weight_V, bias_V):
    """Equation 1, term by term."""
    h = naive_layer_norm(torch.einsum("Dd,...d->...D", W1, F), weight_D, bias_D)
    logits = naive_layer_norm(torch.einsum("VD,...D->...V", W2, h), weight_V, bias_V)
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def leaves(align):
    return [align.W1.weight, align.W2.weight, align.norm_D.weight, align.norm_D.bias, align.norm_V.weight, align.norm_V.bias]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape, d, D, V", SHAPES)
def test_align_equals_the_equations(shape, d, D, V, dtype, tolerance):
    """Outputs, and the gradients of F, E_text and every parameter; the equations always in float64."""
    align, F, E_text, generator = inputs(shape, d, D, V, dtype)
    ours = [F.requires_grad_(), E_text.requires_grad_(), *leaves(align)]
    assert {id(p) for p in align.parameters()} == {id(p) for p in ours[2:]}     # nothing else to learn
    theirs = [p.detach().double().requires_grad_() for p in ours]

    F_align = align(F, E_text)
    P = naive_p_vocab(theirs[0], *theirs[2:])
    expected = torch.zeros(*shape, D, dtype=torch.float64)
    for v in range(V):                                  # equation 2: a sum over the words
        expected = expected + P[..., v, None] * theirs[1][v]
    assert F_align.shape == (*shape, D) and F_align.dtype == dtype
    close(align.p_vocab(F).double(), P, tolerance)
    close(F_align.double(), expected, tolerance)

    g = torch.randn(*shape, D, generator=generator, dtype=dtype)
    (F_align * g).sum().backward()
    (expected * g.double()).sum().backward()
    for a, b in zip(ours, theirs):
        close(a.grad.double(), b.grad, tolerance)


@pytest.mark.parametrize("shape, d, D, V", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_p_vocab_is_a_distribution(shape, d, D, V, size):
    align, F, _, _ = inputs(shape, d, D, V, torch.float32)
    P = align.p_vocab(F * size)
    assert P.shape == (*shape, V)
    assert (P >= 0).all()
    close(P.sum(-1), torch.ones(shape))


@pytest.mark.parametrize("shape, d, D, V", SHAPES)
def test_output_lies_in_the_convex_hull_of_the_words(shape, d, D, V):
    """In no direction u does F' reach beyond the outermost word; where one word has all the weight it reaches it."""
    align, F, E_text, generator = inputs(shape, d, D, V)
    F_align = align(F * 100, E_text)
    for u in torch.randn(200, D, generator=generator, dtype=torch.float64):
        words, reached = E_text @ u, F_align @ u
        assert (words.min() - 1e-12 <= reached).all() and (reached <= words.max() + 1e-12).all()
    for v in (0, V - 1):
        with torch.no_grad():
            align.norm_V.bias.fill_(0.0)[v] = 1e4
        close(align(F, E_text), E_text[v].expand(*shape, D), 1e-12)


def test_W2_starts_as_the_lm_head_and_is_then_its_own():
    align, lm_head = randomise(Align(5, 7, 11)), torch.randn(11, 7)
    original = lm_head.clone()
    align.init_weights(lm_head)
    assert torch.equal(align.W2.weight, lm_head)
    for norm in (align.norm_D, align.norm_V):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    with torch.no_grad():
        align.W2.weight += 1
        assert torch.equal(lm_head, original)
        lm_head.zero_()
    assert torch.equal(align.W2.weight, original + 1)


# ---------------------------------------------------------------------------------------------------------------------
# In blocks of tokens, with nothing V-wide kept


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, and one row at a time."""
    monkeypatch.setattr(connector, "BLOCK_BYTES", 1)
    monkeypatch.setattr(connector, "CACHE_BYTES", 1)


def gradients(output, leaves, g):
    """The gradients of those of `leaves` that are learned; the others must have none."""
    for p in leaves:
        p.grad = None
    output.backward(g)
    assert all(p.requires_grad or p.grad is None for p in leaves)
    return [p.grad for p in leaves if p.requires_grad]


@pytest.mark.parametrize("N", [0, 1, 16, 17, 50])
@pytest.mark.parametrize("learned", [range(8), [0], [1], [2], [3], [5], [6], [7], [0, 7], [2, 5, 6], []])
def test_any_number_of_tokens_and_whatever_is_learned(small_blocks, N, learned):
    """In leaves: F, E_text, W1, W2, norm_D's weight and bias, norm_V's. What is frozen costs no product either."""
    align, F, E_text, generator = inputs((N,), 7, 11, 13)
    ours = [F, E_text, *leaves(align)]
    for i, p in enumerate(ours):
        p.requires_grad_(i in learned)
    with Products() as products:
        F_align, expected = align(F, E_text), align.p_vocab(F) @ E_text
        products.clear()
        if learned:
            g = torch.randn(N, 11, generator=generator, dtype=torch.float64)
            ours_g = gradients(F_align, ours, g)
            count = sum(products)
    assert torch.equal(F_align, expected) if N == 0 else close(F_align, expected, 1e-12) is None
    if not learned:
        return
    for a, b in zip(ours_g, gradients(expected, ours, g), strict=True):
        assert torch.equal(a, b) if N == 0 else close(a, b, 1e-12) is None
    before_z, norm_V = set(learned) & {0, 2, 4, 5}, set(learned) & {6, 7}
    W2, E = 3 in learned, 1 in learned
    wanted = 1 + E + bool(before_z or norm_V or W2) + W2 + bool(before_z)       # z, dE_text, dP, dW2, dh
    assert count == N * wanted


class Products(TorchDispatchMode, list):
    """Of each matrix product with as many words as W2 has (13), the number of tokens in it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = (args if func.overloadpacket == torch.ops.aten.mm else args[1:])[:2]
            sizes = [*a.shape, b.shape[1]]
            if 13 in sizes:
                sizes.remove(13)
                sizes.remove(11)
                self.extend(sizes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("N, V, D", [(5, 7, 3), (18, 5, 4)])
def test_gradients_are_those_of_finite_differences(small_blocks, N, V, D):
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, D), (V, D), (V,), (V,), (V, D)]       # h, W2, weight, bias, E_text
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    torch.autograd.gradcheck(lambda *t: Mixture.apply(*t, 1e-5), tensors)


def test_a_second_derivative_is_refused():
    align, F, E_text, _ = inputs((5,), 7, 11, 13)
    (dF,) = torch.autograd.grad(align(F.requires_grad_(), E_text).square().sum(), F, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dF.sum().backward()


def test_bf16_is_no_further_from_the_truth_than_autograd(small_blocks):
    """With statistics in fp32, against the same bf16 numbers computed in float64."""
    align, F, E_text, generator = inputs((3, 50), 24, 40, 300, torch.bfloat16)
    g = torch.randn(3, 50, 40, generator=generator).bfloat16()
    leaves_of = lambda align, *tensors: [*(t.requires_grad_() for t in tensors), *leaves(align)]
    exact = Align(24, 40, 300).double()
    exact.load_state_dict(align.state_dict())
    ours = leaves_of(align, F, E_text)
    wide = leaves_of(exact, F.detach().double(), E_text.detach().double())
    results = []
    for run, tensors, g in [(lambda: align(F, E_text), ours, g), (lambda: align.p_vocab(F) @ E_text, ours, g),
                            (lambda: exact.p_vocab(wide[0]) @ wide[1], wide, g.double())]:
        y = run()
        results.append([y.detach(), *gradients(y, tensors, g)])
    for a, b, c in zip(*results):
        assert a.dtype == torch.bfloat16
        size = c.abs().max()
        assert (a - c).abs().max() < 1.5 * (b - c).abs().max() + 2 ** -9 * size


def test_nothing_V_wide_is_kept_for_the_backward_pass(small_blocks):
    align, F, E_text, _ = inputs((4, 25), 7, 11, 60)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        align(F, E_text.requires_grad_())
    assert {tuple(t.shape) for t in kept if 60 in t.shape} == {(60, 11), (60,)}         # W2, E_text, norm_V


def test_blocks_cover_every_token_once_within_the_budget(monkeypatch):
    for per_token in (1, 3, 20, 100):
        monkeypatch.setattr(connector, "BLOCK_BYTES", 64 * per_token)
        for N in range(300):
            parts = blocks(N, per_token)
            assert [i for part in parts for i in range(N)[part]] == list(range(N))
            assert all(0 < part.stop - part.start <= min(64, parts[0].stop) for part in parts) or N == 0


def test_align_compiles():
    """torch.compile takes the operator as it is, or leaves it out of its graphs: the same numbers."""
    align, F, E_text, generator = inputs((2, 9), 7, 11, 13)
    ours, g = [F.requires_grad_(), E_text.requires_grad_(), *leaves(align)], torch.randn(2, 9, 11, dtype=torch.float64)
    expected = gradients(align(F, E_text), ours, g)
    for a, b in zip(gradients(torch.compile(align, backend="aot_eager")(F, E_text), ours, g), expected, strict=True):
        close(a, b, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# With K words


def top_K(align, words):
    return AlignTopK(align, torch.as_tensor(words), *spread(align.W2.weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape, d, D, V", SHAPES)
def test_with_all_words_it_is_align(shape, d, D, V, dtype, tolerance):
    """In any order; and with fewer, the logits keep their values: P_vocab of the kept words, over their sum."""
    align, F, E_text, generator = inputs(shape, d, D, V, dtype)
    order = torch.randperm(V, generator=generator)
    close(top_K(align, order)(F, E_text).detach(), align(F, E_text).detach(), tolerance)
    few = order[:V // 2]
    P, P_few = align.p_vocab(F).detach()[..., few], top_K(align, few).p_vocab(F)
    close(P_few, P / P.sum(-1, keepdim=True), tolerance)
    close(top_K(align, few)(F, E_text), P_few @ E_text[few], tolerance)     # a convex combination of the few
    assert (P_few >= 0).all()
    close(P_few.sum(-1), torch.ones(shape, dtype=dtype), 1e-6)
    assert not list(top_K(align, few).state_dict().keys() - align.state_dict().keys())


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_statistics_are_those_of_the_full_vocabulary(offset):
    """Also where W2's rows share a part 100 times as long as their spread, and E[z^2] - E[z]^2 would cancel."""
    generator = torch.Generator().manual_seed(4)
    W2 = torch.randn(9000, 24, generator=generator) + offset * torch.randn(24, generator=generator)
    h = torch.randn(50, 24, generator=generator)
    z = h.double() @ W2.double().T
    m, C = spread(W2)
    close(h @ m, z.mean(-1).float())
    close((h @ C * h).sum(-1), z.var(-1, correction=0).float())
    G = W2.T @ W2
    naive = (h @ G * h).sum(-1) / 9000 - (h @ m) ** 2
    assert (naive - z.var(-1, correction=0)).abs().max() < 1e-5 * z.var(-1).max() or offset > 0


def test_in_bf16_the_statistics_are_fp32(small_blocks):
    align, F, E_text, _ = inputs((50,), 24, 40, 300, torch.bfloat16)
    m, C = spread(align.W2.weight)
    assert m.dtype == C.dtype == torch.float32
    ours, full = top_K(align, range(300))(F, E_text), align(F, E_text)
    exact = Align(24, 40, 300).double()
    exact.load_state_dict(align.state_dict())
    exact = exact(F.double(), E_text.double())
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 1.5 * (full - exact).abs().max()


def test_more_words_change_less(small_blocks):
    """Chosen are those with most probability; on an unseen page too what they change falls as K grows."""
    align, F, E_text, generator = inputs((3, 40), 24, 16, 200)
    with torch.no_grad():
        align.norm_V.bias += 2 * torch.randn(200, generator=generator, dtype=torch.float64)      # some words matter more
    pages = list(F)
    mass = align.p_vocab(F).sum((0, 1))
    measured = []
    for K in (1, 5, 20, 100, 200):
        words, deviation = choose_words(align, pages, E_text, K)
        assert torch.equal(words, mass.topk(K).indices)
        measured.append(deviation)
    for name, sign in [("probability", 1), ("mean_cosine_distance", -1), ("largest_relative_error", -1)]:
        values = [sign * m[name] for m in measured]
        assert values == sorted(values) and values[0] < values[-2] < values[-1]
    assert measured[-1]["probability"] == 1 and measured[-1]["largest_relative_error"] < 1e-12


def test_each_page_is_measured_with_the_words_of_the_others():
    align, F, E_text, _ = inputs((2, 40), 24, 16, 200)
    a, b = F
    P = [align.p_vocab(page).sum(0) for page in (a, b)]
    _, deviation = choose_words(align, [a, b], E_text, 10)
    kept = [mine[other.topk(10).indices].sum() / mine.sum() for mine, other in (P, P[::-1])]
    assert deviation["probability"] == pytest.approx(sum(kept).item() / 2, rel=1e-12)
    _, alone = choose_words(align, [a], E_text, 10)
    assert alone["probability"] == pytest.approx((P[0].topk(10).values.sum() / P[0].sum()).item(), rel=1e-12)
    full, few = align(a, E_text), top_K(align, P[0].topk(10).indices)(a, E_text)
    error = ((few - full).norm(dim=-1) / full.norm(dim=-1)).max().item()
    assert alone["largest_relative_error"] == pytest.approx(error, rel=1e-9)
    cosine = 1 - (few * full).sum(-1) / few.norm(dim=-1) / full.norm(dim=-1)
    assert alone["mean_cosine_distance"] == pytest.approx(cosine.mean().item(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Inside AlignVLM


def small_vlm(tied):
    vision = SigLIPConfig(hidden_size=12, n_layers=1, n_heads=2, intermediate_size=20, image_size=9, patch_size=4)
    llm = LlamaConfig(vocab_size=23, hidden_size=10, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=6,
                      intermediate_size=14, tie_embeddings=tied)
    vlm = randomise(AlignVLM(AlignVLMConfig(vision, llm)).double())
    tokens = torch.full((1, 2 * vision.n_patches), IMAGE)       # two tiles and not a word
    return vlm, tokens, torch.randn(2, 3, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize("tied", [True, False])
def test_W2_is_no_alias_of_the_lm_head(tied):
    """After one step of training only on W2 the head is as it was, and the other way round."""
    vlm, _, _ = small_vlm(tied)
    vlm.connector.init_weights(vlm.llm.head)
    head, W2 = vlm.llm.head.detach().clone(), vlm.connector.W2.weight
    assert torch.equal(W2, head) and W2.data_ptr() != vlm.llm.head.data_ptr()
    names = [n for n, _ in vlm.named_parameters()]
    assert "connector.W2.weight" in names and ("llm.lm_head.weight" in names) != tied
    with torch.no_grad():
        W2 += 1
        assert torch.equal(vlm.llm.head, head)
        vlm.llm.head.mul_(3)
    assert torch.equal(W2, head + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_E_text_is_the_live_input_embedding(tied):
    """Through the visual tokens alone the gradient P^T g reaches llm.embed_tokens, and its change reaches them."""
    vlm, tokens, pixels = small_vlm(tied)
    E_text = vlm.llm.embed_tokens.weight
    F_align = vlm.embed(tokens, pixels)[0]
    P = vlm.connector.p_vocab(vlm.vision(pixels)).flatten(0, 1).detach()
    g = torch.randn_like(F_align)
    (F_align * g).sum().backward()
    close(E_text.grad, P.T @ g, 1e-12)
    assert tied or vlm.llm.lm_head.weight.grad is None

    change = torch.randn_like(E_text)
    with torch.no_grad():
        E_text += change
    close(vlm.embed(tokens, pixels)[0].detach(), F_align.detach() + P @ change, 1e-12)


def test_chosen_words_are_stored_and_used(tmp_path):
    """Through the folder and back; what is not a choice of K words of this vocabulary is refused in one line."""
    vlm, tokens, pixels = small_vlm(tied=True)
    full = vlm.embed(tokens, pixels)
    with pytest.raises(CheckpointError, match="no words have been chosen"):
        use_align_vocab(vlm, tmp_path, 9)
    for K in (0, 24):
        with pytest.raises(InputError, match="has 23"):
            choose_align_vocab(vlm, tmp_path, [pixels], K)
    assert not list(tmp_path.iterdir())
    deviation = choose_align_vocab(vlm, tmp_path, list(pixels[:, None]), 9)
    stored = json.loads((tmp_path / ALIGN_VOCAB).read_text())
    words = stored.pop("words")
    assert stored == deviation and deviation["pages"] == 2 and [*tmp_path.iterdir()] == [tmp_path / ALIGN_VOCAB]
    assert torch.equal(vlm.embed(tokens, pixels), full)         # choosing changes nothing yet
    with pytest.raises(CheckpointError, match="9 words, not 8"):
        use_align_vocab(vlm, tmp_path, 8)

    good = (tmp_path / ALIGN_VOCAB).read_text()
    for bad in ("", good[:len(good) // 2], "[]", "{}", '{"words": 3}', '{"words": [0, 1, 23]}', '{"words": [0, 1, -1]}',
                '{"words": [0, 1, 1]}', '{"words": [0, 1, true]}', '{"words": [0, 1, 2.0]}', '{"words": []}'):
        (tmp_path / ALIGN_VOCAB).write_text(bad)
        with pytest.raises(CheckpointError) as error:
            use_align_vocab(vlm, tmp_path, 3)
        assert str(tmp_path / ALIGN_VOCAB) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / ALIGN_VOCAB).write_text(good)

    F = vlm.vision(pixels).flatten(0, 1)
    E_text, align = vlm.llm.embed_tokens.weight, vlm.connector
    use_align_vocab(vlm, tmp_path, 9)
    close(vlm.embed(tokens, pixels)[0].detach(), top_K(align, words)(F, E_text).detach(), 1e-12)
