"""Align against equations 1 and 2 written out, and what the paper says of it: convex, from the LM head, on live words."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import connector
from conftest import close, randomise
from connector import Align, Mixture, blocks
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
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
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
    assert (3, 100, 1) in {tuple(t.shape) for t in kept}                                # mean, 1 / std, lse


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
