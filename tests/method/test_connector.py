"""connector.py against equations 1 and 2 written out, and what the paper says of Align.

F' is convex, W2 starts from the LM head, and E_text is the live input embedding.
"""
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import connector
from conftest import close, n_parameters, randomise
from connector import (CONNECTORS, Align, AlignTopK, ConnectorConfig, Mixture, MLPConnector, Ovis,
                       multiply, new_connector, softmax_layer_norm, spread, token_blocks)
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, AlignVLM, AlignVLMConfig
from small_models import CONNECTOR, LLM, TILES, VISION

# (leading dimensions, d, D, V). No d of 1 or D of 2: a LayerNorm's output is then +-1 and F's
# gradient pure rounding.
SHAPES = [((2, 4), 8, 16, 32), ((3, 5), 7, 11, 13), ((1, 1), 3, 4, 5), ((), 6, 5, 29),
          ((2, 3, 2), 9, 4, 101), ((7,), 2, 6, 3)]


def inputs(shape: tuple[int, ...], d: int, D: int, V: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    align = randomise(Align(d, D, V).to(dtype))
    F = torch.randn(*shape, d, generator=generator, dtype=dtype)
    E_text = torch.randn(V, D, generator=generator, dtype=dtype)
    return align, F, E_text, generator


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5) ** 0.5 * weight + bias


def naive_p_vocab(F: Tensor, W1: Tensor, W2: Tensor, weight_D: Tensor, bias_D: Tensor,
                  weight_V: Tensor, bias_V: Tensor) -> Tensor:
    """Equation 1, term by term."""
    h = naive_layer_norm(torch.einsum("Dd,...d->...D", W1, F), weight_D, bias_D)
    logits = naive_layer_norm(torch.einsum("VD,...D->...V", W2, h), weight_V, bias_V)
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def leaves(align: Align) -> list[Tensor]:
    """In the order of naive_p_vocab."""
    return [align.W1.weight, align.W2.weight, align.norm_D.weight, align.norm_D.bias,
            align.norm_V.weight, align.norm_V.bias]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape, d, D, V", SHAPES)
def test_align_equals_the_equations(shape, d, D, V, dtype, tolerance):
    """Outputs, and the gradients of F, E_text and every parameter; the equations in float64."""
    align, F, E_text, generator = inputs(shape, d, D, V, dtype)
    ours = [F.requires_grad_(), E_text.requires_grad_(), *leaves(align)]
    # There is nothing else to learn.
    assert {id(p) for p in align.parameters()} == {id(p) for p in ours[2:]}
    theirs = [p.detach().double().requires_grad_() for p in ours]

    F_align = align(F, E_text)
    P = naive_p_vocab(theirs[0], *theirs[2:])
    expected = torch.zeros(*shape, D, dtype=torch.float64)
    for v in range(V):                              # equation 2: a sum over the tokens
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
def test_output_lies_in_the_convex_hull_of_the_token_embeddings(shape, d, D, V):
    """In no direction u does F' reach beyond the outermost row of E_text.

    Where one token has all the weight it reaches that row.
    """
    align, F, E_text, generator = inputs(shape, d, D, V)
    F_align = align(F * 100, E_text)
    for u in torch.randn(200, D, generator=generator, dtype=torch.float64):
        rows, reached = E_text @ u, F_align @ u
        assert (rows.min() - 1e-12 <= reached).all() and (reached <= rows.max() + 1e-12).all()
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


# ------------------------------------------------------------------------------------------------
# In blocks of tokens, with nothing V-wide kept


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, and one row at a time."""
    monkeypatch.setattr(connector, "BLOCK_BYTES", 1)
    monkeypatch.setattr(connector, "CACHE_BYTES", 1)


def gradients(output: Tensor, tensors: list[Tensor], g: Tensor) -> list[Tensor]:
    """The gradients of those of `tensors` that are learned; the others must have none."""
    for p in tensors:
        p.grad = None
    output.backward(g)
    assert all(p.requires_grad or p.grad is None for p in tensors)
    return [p.grad for p in tensors if p.requires_grad]


class Products(TorchDispatchMode, list):
    """Of each matrix product with V = 13 and D = 11, the number of visual tokens in it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            sizes = [*a.shape, b.shape[1]]
            if 13 in sizes:
                sizes.remove(13)
                sizes.remove(11)
                self.extend(sizes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("N", [0, 1, 16, 17, 50])
@pytest.mark.parametrize("learned", [range(8), [0], [1], [2], [3], [5], [6], [7], [0, 7],
                                     [2, 5, 6], []])
def test_any_number_of_tokens_and_whatever_is_learned(small_blocks, N, learned):
    """Learned are some of F, E_text, W1, W2, norm_D's weight and bias, norm_V's.

    What is frozen costs no product either.
    """
    align, F, E_text, generator = inputs((N,), 7, 11, 13)
    ours = [F, E_text, *leaves(align)]
    for i, p in enumerate(ours):
        p.requires_grad_(i in learned)

    def same(a: Tensor, b: Tensor) -> None:
        assert a.shape == b.shape
        if N == 0:
            assert not a.any() and not b.any()
        else:
            close(a, b, 1e-12)

    F_align, expected = align(F, E_text), align.p_vocab(F) @ E_text
    same(F_align, expected)
    if not learned:
        return
    g = torch.randn(N, 11, generator=generator, dtype=torch.float64)
    with Products() as products:
        ours_g = gradients(F_align, ours, g)
    for a, b in zip(ours_g, gradients(expected, ours, g), strict=True):
        same(a, b)
    dh = bool({0, 2, 4, 5} & set(learned))
    dP = dh or bool({3, 6, 7} & set(learned))
    wanted = 1 + (1 in learned) + dP + (3 in learned) + dh      # z, dE_text, dP, dW2, dh
    assert sum(products) == N * wanted


@pytest.mark.parametrize("N, V, D", [(5, 7, 3), (18, 5, 4)])
def test_gradients_are_those_of_finite_differences(small_blocks, N, V, D):
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, D), (V, D), (V,), (V,), (V, D)]       # h, W2, weight, bias, E_text
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
               for shape in shapes]
    torch.autograd.gradcheck(lambda *t: Mixture.apply(*t, 1e-5, multiply), tensors)


def test_a_second_derivative_is_refused():
    align, F, E_text, _ = inputs((5,), 7, 11, 13)
    loss = align(F.requires_grad_(), E_text).square().sum()
    (dF,) = torch.autograd.grad(loss, F, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dF.sum().backward()


def test_bf16_is_no_further_from_the_truth_than_autograd(small_blocks):
    """With statistics in fp32, against the same bf16 numbers computed in float64."""
    align, F, E_text, generator = inputs((3, 50), 24, 40, 300, torch.bfloat16)
    g = torch.randn(3, 50, 40, generator=generator).bfloat16()
    exact = Align(24, 40, 300).double()
    exact.load_state_dict(align.state_dict())
    ours = [F.requires_grad_(), E_text.requires_grad_(), *leaves(align)]
    F_wide, E_wide = F.detach().double(), E_text.detach().double()
    wide = [F_wide.requires_grad_(), E_wide.requires_grad_(), *leaves(exact)]

    def results(F_align, tensors, g):
        return [F_align.detach(), *gradients(F_align, tensors, g)]

    in_blocks = results(align(F, E_text), ours, g)
    autograd = results(align.p_vocab(F) @ E_text, ours, g)
    truth = results(exact.p_vocab(F_wide) @ E_wide, wide, g.double())
    for a, b, c in zip(in_blocks, autograd, truth):
        assert a.dtype == torch.bfloat16
        size = c.abs().max()
        assert (a - c).abs().max() < 1.5 * (b - c).abs().max() + 2 ** -9 * size


def test_in_bf16_a_probability_is_rounded_once():
    """LayerNorm and softmax are fp32: were the norm's output rounded too, what is far from the mean
    would be off by ten times as much."""
    generator = torch.Generator().manual_seed(5)
    z, weight, bias = (torch.randn(*shape, generator=generator).bfloat16()
                       for shape in ((40, 300), (300,), (300,)))
    P = torch.empty_like(z)
    softmax_layer_norm(z, 2 * weight, bias, 1e-5, out=P)
    wide = torch.nn.functional.layer_norm(z.double(), (300,), 2 * weight.double(), bias.double())
    exact = wide.softmax(-1)
    assert ((P - exact).abs() <= 1.01 * 2 ** -8 * exact).all()


def test_nothing_V_wide_is_kept_for_the_backward_pass(small_blocks):
    align, F, E_text, _ = inputs((4, 25), 7, 11, 60)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        align(F, E_text.requires_grad_())
    # W2, E_text, norm_V
    assert {tuple(t.shape) for t in kept if 60 in t.shape} == {(60, 11), (60,)}


def test_blocks_cover_every_token_once_within_the_budget(monkeypatch):
    for bytes_per_token in (1, 3, 20, 100):
        monkeypatch.setattr(connector, "BLOCK_BYTES", 64 * bytes_per_token)
        for N, most in itertools.product(range(300), (64, 32)):
            budget = () if most == 64 else (most * bytes_per_token,)
            blocks = token_blocks(N, bytes_per_token, *budget)
            assert [i for block in blocks for i in range(N)[block]] == list(range(N))
            lengths = [block.stop - block.start for block in blocks]
            assert N == 0 or all(0 < n <= min(most, lengths[0]) for n in lengths)


def test_align_compiles():
    """torch.compile takes the operator as it is, or leaves it out: the same numbers."""
    align, F, E_text, generator = inputs((2, 9), 7, 11, 13)
    ours = [F.requires_grad_(), E_text.requires_grad_(), *leaves(align)]
    g = torch.randn(2, 9, 11, generator=generator, dtype=torch.float64)
    expected = gradients(align(F, E_text), ours, g)
    compiled = torch.compile(align, backend="aot_eager")
    for a, b in zip(gradients(compiled(F, E_text), ours, g), expected, strict=True):
        close(a, b, 1e-12)


# ------------------------------------------------------------------------------------------------
# With K tokens


def top_K(align: Align, token_ids) -> AlignTopK:
    return AlignTopK(align, torch.as_tensor(token_ids), *spread(align.W2.weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape, d, D, V", SHAPES)
def test_with_all_tokens_it_is_align(shape, d, D, V, dtype, tolerance):
    """In any order. With fewer, P_vocab is that of the kept tokens, over their sum."""
    align, F, E_text, generator = inputs(shape, d, D, V, dtype)
    order = torch.randperm(V, generator=generator)
    close(top_K(align, order)(F, E_text).detach(), align(F, E_text).detach(), tolerance)
    few = order[:V // 2]
    P, P_few = align.p_vocab(F).detach()[..., few], top_K(align, few).p_vocab(F)
    close(P_few, P / P.sum(-1, keepdim=True), tolerance)
    # A convex combination of the few.
    close(top_K(align, few)(F, E_text), P_few @ E_text[few], tolerance)
    assert (P_few >= 0).all()
    close(P_few.sum(-1), torch.ones(shape, dtype=dtype), 1e-6)
    assert not list(top_K(align, few).state_dict().keys() - align.state_dict().keys())


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_statistics_are_those_of_the_full_vocabulary(offset):
    """Also where W2's rows share a part 100 times as long as their spread.

    E[z^2] - E[z]^2 would cancel there.
    """
    generator = torch.Generator().manual_seed(4)
    common = offset * torch.randn(24, generator=generator)
    W2 = torch.randn(9000, 24, generator=generator) + common
    h = torch.randn(50, 24, generator=generator)
    z = h.double() @ W2.double().T
    m, C = spread(W2)
    close(h @ m, z.mean(-1).float())
    close((h @ C * h).sum(-1), z.var(-1, correction=0).float())
    naive = (h @ (W2.T @ W2) * h).sum(-1) / 9000 - (h @ m) ** 2
    cancels = (naive - z.var(-1, correction=0)).abs().max() > 1e-3 * z.var(-1).max()
    assert cancels == (offset > 0)


def test_in_bf16_the_statistics_are_fp32(small_blocks):
    align, F, E_text, _ = inputs((50,), 24, 40, 300, torch.bfloat16)
    m, C = spread(align.W2.weight)
    assert m.dtype == C.dtype == torch.float32
    close(m.double(), align.W2.weight.double().mean(0), 1e-6)
    ours, full = top_K(align, range(300))(F, E_text), align(F, E_text)
    exact = Align(24, 40, 300).double()
    exact.load_state_dict(align.state_dict())
    exact = exact(F.double(), E_text.double())
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 1.5 * (full - exact).abs().max()


# ------------------------------------------------------------------------------------------------
# The paper's other connectors. The Perceiver's equations are Idefics2's, in
# tests/system/test_connectors.py.

OTHERS = [kind for kind in CONNECTORS if kind != "align"]


@pytest.mark.parametrize("shape, d, D", [((2, 9), 12, 10), ((1, 1), 3, 7), ((17,), 8, 8)])
def test_mlp_is_llavas(shape, d, D):
    ours = randomise(MLPConnector(d, D))
    theirs = torch.nn.Sequential(torch.nn.Linear(d, D), torch.nn.GELU(), torch.nn.Linear(D, D))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(mine.data)
    F = torch.randn(*shape, d)
    F_ours, F_theirs = ours(F, None), theirs(F)
    assert F_ours.shape == (*shape, D)
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        close(mine.grad, other.grad)


@pytest.mark.parametrize("shape, d, D, K", [((2, 9), 12, 10, 37), ((1, 1), 3, 7, 5),
                                            ((70,), 8, 3, 131)])
@pytest.mark.parametrize("block_bytes", [1, 2 ** 28])
def test_ovis_is_a_mixture_of_its_table(shape, d, D, K, block_bytes, monkeypatch):
    """In blocks and as one, against its equation written out."""
    monkeypatch.setattr(connector, "BLOCK_BYTES", block_bytes)
    ours = randomise(Ovis(d, D, K))
    F = torch.randn(*shape, d, requires_grad=True)
    F_ours = ours(F, None)
    assert F_ours.shape == (*shape, D)
    tensors = {"F": F, **dict(ours.named_parameters())}
    p = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    z = p["F"] @ p["W_VET.weight"].T
    e = naive_layer_norm(z, p["norm_K.weight"], p["norm_K.bias"]).exp()
    F_theirs = e / e.sum(-1, keepdim=True) @ p["table"]
    close(F_ours, F_theirs)
    g = torch.randn_like(F_ours)
    F_ours.backward(g)
    F_theirs.backward(g)
    for name, tensor in tensors.items():
        close(tensor.grad, p[name].grad)


def test_new_ones_start_as_they_should():
    """Matrices keep the size of what comes in, latents and table are N(0, 1).

    The LLM's token embeddings play no part.
    """
    torch.manual_seed(0)
    d, D, V = 64, 96, 50
    E_text = torch.randn(V, D)
    for kind in OTHERS:
        new = new_connector(replace(CONNECTOR, kind=kind, table_size=4096), d, D, V)
        new.init_weights(E_text)
        assert all(p.isfinite().all() for p in new.parameters())
        F = torch.randn(2, 9, d)
        assert torch.equal(new(F, E_text), new(F, E_text + 1))
        for name, p in new.named_parameters():
            if p.ndim == 1:
                assert (p == (0 if name.endswith("bias") else 1)).all()
            else:
                std = 1 if name in ("table", "latents") else p.shape[1] ** -0.5
                assert p.std().item() == pytest.approx(std, rel=0.1), (kind, name)
    assert isinstance(new_connector(ConnectorConfig(), d, D, V), Align)


def test_presets():
    assert {preset.connector.kind for preset in ALIGNVLM_PRESETS.values()} == {"align"}
    real = ALIGNVLM_PRESETS["llama-3.2-1b"].connector
    assert real == ConnectorConfig("align", table_size=65536, n_latents=64, depth=3, n_heads=16,
                                   n_kv_heads=4, head_dim=96)
    with torch.device("meta"):
        ovis = new_connector(replace(real, kind="ovis"), 1152, 2048, 128256)
    assert n_parameters(ovis) == 65536 * (1152 + 2 + 2048)


# ------------------------------------------------------------------------------------------------
# Inside AlignVLM


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_model_with_it_learns_and_counts_its_tokens(kind):
    model = randomise(AlignVLM(AlignVLMConfig(TILES, LLM, replace(CONNECTOR, kind=kind))))
    n = 5 if kind == "perceiver" else 16
    assert model.config.tile_tokens == n
    pixels = torch.randn(2, 3, 12, 12)
    tokens = torch.cat([torch.full((2 * n,), IMAGE), torch.arange(8)])
    labels = torch.full_like(tokens, IGNORE)
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
    message = f"{2 * n + 1} image positions for {2 * n} visual tokens"
    with pytest.raises(ValueError, match=message):
        model.embed(torch.full((1, 2 * n + 1), IMAGE), pixels)


def vlm_and_tiles(tied: bool) -> tuple[AlignVLM, Tensor, Tensor]:
    """A model in fp64, and the tokens of two tiles and not one of text."""
    llm = replace(LLM, tie_embeddings=tied)
    vlm = randomise(AlignVLM(AlignVLMConfig(VISION, llm)).double())
    tokens = torch.full((1, 2 * VISION.n_patches), IMAGE)
    return vlm, tokens, torch.randn(2, 3, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize("tied", [True, False])
def test_W2_is_no_alias_of_the_lm_head(tied):
    """After a change of W2 alone the head is as it was, and the other way round."""
    vlm, _, _ = vlm_and_tiles(tied)
    vlm.connector.init_weights(vlm.llm.head)
    head, W2 = vlm.llm.head.detach().clone(), vlm.connector.W2.weight
    assert torch.equal(W2, head) and W2.data_ptr() != vlm.llm.head.data_ptr()
    names = [name for name, _ in vlm.named_parameters()]
    assert "connector.W2.weight" in names and ("llm.lm_head.weight" in names) != tied
    with torch.no_grad():
        W2 += 1
        assert torch.equal(vlm.llm.head, head)
        vlm.llm.head.mul_(3)
    assert torch.equal(W2, head + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_E_text_is_the_live_input_embedding(tied):
    """Through the visual tokens alone the gradient P^T g reaches llm.embed_tokens.

    And its change reaches them.
    """
    vlm, tokens, pixels = vlm_and_tiles(tied)
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
