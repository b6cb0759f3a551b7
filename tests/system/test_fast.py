"""plumbing/linear.py's products and their gradients, beside the sums written out in fp64."""
import pytest
import torch
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint

from conftest import close
from plumbing import fast as products
from plumbing.fast import Linear, RMSNorm, into, linear, pack

SHAPES = [(7,), (1, 7), (1, 1, 7), (3, 7), (2, 8, 7), (17, 7), (0, 7), (2, 0, 7), (5, 1, 33), (300, 64)]


def written_out(x, W, bias):
    y = (x.double()[..., None, :] * W.double()).sum(-1)
    return y if bias is None else y + bias.double()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)        # a sum of few numbers that happens to be near zero has no relative error to speak of


@pytest.fixture(params=[True, False], ids=["AMD", "another CPU"])
def amd(request, monkeypatch) -> bool:
    """On either, wherever the tests run."""
    monkeypatch.setattr(products, "AMD", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which way each product went, in order."""
    ways = []
    for module, name in [(nnf, "linear"), (products, "onednn"), (torch, "mm"), (torch, "addmm")]:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **kw: ways.append(name) or real(*a, **kw))
    return ways


@pytest.mark.parametrize("V", [1, 31, 64, 481])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product(V, shape, dtype, biased, amd, calls):
    """Any number of rows, in rows or columns; on an AMD CPU in fp32 by oneDNN, and one row without a bias by MKL."""
    x, W = torch.randn(shape, dtype=dtype), torch.randn(V, shape[-1], dtype=dtype)
    bias = torch.randn(V, dtype=dtype) if biased else None
    expected, n = written_out(x, W, bias), x.shape[:-1].numel()
    for x in [x, x.mT.contiguous().mT] if x.ndim > 1 else [x]:
        calls.clear()
        with torch.no_grad():
            y = linear(x, W, bias)
        assert y.shape == expected.shape and y.dtype == dtype
        plain = not amd or dtype != torch.float32 or n == 0
        assert calls == ["linear" if plain else "mm" if n == 1 and not biased else "onednn"]
        if n:
            close(y.double(), expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("V", [1, 31, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learns", [(True, True, True), (False, True, True), (True, False, False), (True, True, None)])
def test_its_gradients(V, shape, learns, amd, calls):
    """Of what learns; what is frozen costs no product."""
    inputs = [torch.randn(s).requires_grad_(bool(on)) for s, on in zip([shape, (V, shape[-1]), (V,)], learns)]
    x, W, bias = inputs[0], inputs[1], None if learns[2] is None else inputs[2]
    y = linear(x, W, bias)
    dy = torch.randn_like(y)
    expected = written_out(x, W, bias)
    wanted = [p for p in (x, W, bias) if p is not None and p.requires_grad]
    gradients = torch.autograd.grad(expected, wanted, dy.double())
    calls.clear()
    for found, gradient in zip(torch.autograd.grad(y, wanted, dy), gradients):
        assert found.dtype == torch.float32 and found.shape == gradient.shape
        if x.numel():
            close(found.double(), gradient.double(), 1e-5)
        else:
            assert not found.any() and not gradient.any()
    assert len(calls) == (sum(learns[:2]) if amd and x.numel() else 0)


def outcome(layer, x):
    """The layer's outputs and gradients."""
    layer.zero_grad()
    y = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    return y.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()


def test_a_layer_is_torchs_also_recomputed_compiled_and_where_there_is_no_onednn(amd, monkeypatch):
    layer, plain, x = Linear(6, 5), torch.nn.Linear(6, 5), torch.randn(4, 6, requires_grad=True)
    plain.load_state_dict(layer.state_dict())
    expected = outcome(plain, x)
    for found in outcome(layer, x), outcome(torch.compile(layer, backend="eager", fullgraph=True), x):
        for a, b in zip(found, expected, strict=True):
            close(a, b, 1e-6)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(products, "onednn", None)
    for a, b in zip(outcome(layer, x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n,k,m", [(3, 5, 7), (2100, 9, 4100), (0, 3, 4), (5, 2049, 3), (6, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_into(n, k, m, dtype, beta, amd, calls):
    """Over what is there, or added to it; in cells where oneDNN makes it; of rows, columns and slices of more."""
    a, B = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype)
    there = torch.randn(n, m + 1, dtype=dtype) if beta else torch.full((n, m + 1), torch.nan, dtype=dtype)
    expected = a.double() @ B.double() + (beta * there[:, :m].double() if beta else 0)
    for a, B in (a, B), (a.T.contiguous().T, B.T.contiguous().T):
        out = there.clone()
        calls.clear()
        assert into(out[:, :m], a, B, beta).shape == (n, m)
        assert set(calls) <= {"onednn" if amd and dtype == torch.float32 and k else "addmm"}
        if n and (k or beta):
            close(out[:, :m].double(), expected, 1e-5)
        elif n:
            assert not out[:, :m].any()
        if n:
            assert torch.equal(out[:, m], there[:, m]) or beta == 0


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 64), (5, 33), (0, 4), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
def test_a_norm_is_the_same_when_packed(shape, dtype, size):
    """Of small rows, where eps counts, and large ones, against the equation in fp64."""
    norm, x = RMSNorm(shape[-1], 1e-5), size * torch.randn(shape)
    norm.weight.data.uniform_(0.5, 2.0)
    norm, x = norm.to(dtype), x.to(dtype)
    wide = x.double()
    expected = norm.weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    pack(norm)
    y = norm(x)
    assert y.dtype == dtype and y.shape == x.shape
    if expected.any():
        close(y.double(), expected, 5e-3 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert not y.any()
