"""plumbing/fast.py: its products beside sums in fp64, and models that use it beside plain ones."""
import copy
import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import close, randomise
from connector import CONNECTORS, ConnectorConfig, new_connector
from model import AlignVLM, AlignVLMConfig, Llama
from plumbing import cuda, fast
from small_models import (PROMPTS, SAMPLES, STEPS, VISION, generated, gradients_of, row_of,
                          small_llama, small_vlm)
from train import shard

SHAPES = [(7,), (1, 7), (1, 1, 7), (3, 7), (2, 8, 7), (17, 7), (0, 7), (2, 0, 7), (5, 1, 33),
          (300, 64)]


def written_out(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.double()[..., None, :] * W.double()).sum(-1)
    return y if bias is None else y + bias.double()


@pytest.fixture(autouse=True)
def seed():
    """A sum of few numbers that happens to be near zero has no relative error to speak of."""
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["AMD", "another CPU"])
def amd(request, monkeypatch) -> bool:
    """On either, wherever the tests run."""
    monkeypatch.setattr(fast, "AMD", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which way each product went, in order."""
    ways = []

    def watch(module, name):
        real = getattr(module, name)

        def watched(*args, **options):
            ways.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(nnf, "linear")
    watch(fast, "onednn")
    watch(torch, "mm")
    watch(torch, "addmm")
    return ways


# ------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("V", [1, 31, 64, 481])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product(V, shape, dtype, biased, amd, calls):
    """Any number of rows, in rows or columns.

    On an AMD CPU in fp32 by oneDNN, and one row without a bias by MKL.
    """
    x, W = torch.randn(shape, dtype=dtype), torch.randn(V, shape[-1], dtype=dtype)
    bias = torch.randn(V, dtype=dtype) if biased else None
    expected = written_out(x, W, bias)
    n = x.shape[:-1].numel()
    if not amd or dtype != torch.float32 or n == 0:
        way = "linear"
    else:
        way = "mm" if n == 1 and not biased else "onednn"
    for x in [x, x.mT.contiguous().mT] if x.ndim > 1 else [x]:
        calls.clear()
        with torch.no_grad():
            y = fast.linear(x, W, bias)
        assert y.shape == expected.shape and y.dtype == dtype
        assert calls == [way]
        if n:
            close(y.double(), expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("V", [1, 31, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learns", [(True, True, True), (False, True, True), (True, False, False),
                                    (True, True, None)])
def test_its_gradients(V, shape, learns, amd, calls):
    """Of what learns; what is frozen costs no product."""
    x, W = torch.randn(shape), torch.randn(V, shape[-1])
    bias = torch.randn(V) if learns[2] is not None else None
    inputs = [(p, on) for p, on in zip((x, W, bias), learns) if p is not None]
    wanted = [p.requires_grad_() for p, on in inputs if on]
    y = fast.linear(x, W, bias)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(written_out(x, W, bias), wanted, dy.double())
    calls.clear()
    for found, gradient in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        assert found.dtype == torch.float32 and found.shape == gradient.shape
        if x.numel():
            close(found.double(), gradient.double(), 1e-5)
        else:
            assert not found.any() and not gradient.any()
    assert len(calls) == (sum(learns[:2]) if amd and x.numel() else 0)


def outcome(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The layer's output and gradients, recomputed in the backward pass."""
    layer.zero_grad()
    y = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    return y.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()


def test_a_layer_is_torchs_also_recomputed_compiled_and_where_there_is_no_onednn(amd, monkeypatch):
    layer, plain, x = fast.Linear(6, 5), nn.Linear(6, 5), torch.randn(4, 6, requires_grad=True)
    plain.load_state_dict(layer.state_dict())
    expected = outcome(plain, x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for found in outcome(layer, x), outcome(compiled, x):
        for a, b in zip(found, expected, strict=True):
            close(a, b, 1e-6)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(fast, "onednn", None)
    for a, b in zip(outcome(layer, x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n,k,m", [(3, 5, 7), (2100, 9, 4100), (0, 3, 4), (5, 2049, 3), (6, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("add", [0.0, 1.0, 0.5])
def test_multiply(n, k, m, dtype, add, amd, calls):
    """Over what is there, or added to it; of rows, columns and slices of more.

    Where oneDNN makes it, in cells: but it never gets some columns of a B that lies row by row,
    which it would read number by number.
    """
    a, B = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype)
    there = torch.randn(n, m + 1, dtype=dtype)
    expected = a.double() @ B.double() + add * there[:, :m].double()
    if not add:
        there.fill_(torch.nan)
    by_rows = by_columns = ["addmm"]
    if amd and dtype == torch.float32 and k:
        by_rows = ["onednn"] * max(1, math.ceil(n / fast.CELL))
        by_columns = by_rows * math.ceil(m / fast.CELL)
    for a, B, ways in ((a, B, by_rows),
                       (a.T.contiguous().T, B.T.contiguous().T, by_columns)):
        whole = there.clone()
        out = whole[:, :m]
        calls.clear()
        fast.multiply(a, B, out=out, add=add)
        assert calls == ways
        if not n:
            continue
        if k or add:
            close(out.double(), expected, 1e-5)
        else:
            assert not out.any()
        assert torch.equal(whole[:, m], there[:, m]) or not add


# ------------------------------------------------------------------------------------------------
# Norms and attention


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 64), (5, 33), (0, 4), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e4])
def test_a_norm_is_the_same_when_laid_out(shape, dtype, size):
    """Of small rows, where eps counts, and large ones, against the equation in fp64."""
    llm = Llama(small_llama(hidden_size=shape[-1], n_layers=1, rms_norm_eps=1e-5))
    norm, x = llm.norm, (size * torch.randn(shape)).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0)
    llm.to(dtype)
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = norm.weight.double() * wide / root
    fast.use(llm, inference=True)
    assert norm.laid_out is not None
    y = norm(x)
    assert y.dtype == dtype and y.shape == x.shape
    if expected.any():
        close(y.double(), expected, 5e-3 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert not y.any()


@pytest.mark.parametrize("avx", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_attention_is_in_bf16_only_where_that_is_faster(amx, avx, monkeypatch):
    """On a CPU: to read a prompt, where AMX multiplies; to learn from long samples, where AVX-512
    does. The result is the same up to rounding."""
    monkeypatch.setattr(fast, "AMX", amx)
    monkeypatch.setattr(fast, "AVX512_BF16", avx)
    q, k, v = [torch.randn(2, heads, 9, 16).bfloat16() for heads in (4, 2, 2)]
    later = torch.full((9, 9), -torch.inf).triu(1)
    real = nnf.scaled_dot_product_attention
    expected = real(q.float(), k.float(), v.float(), later, enable_gqa=True)
    dtypes = []

    def watched(q, *args, **options):
        dtypes.append(q.dtype)
        return real(q, *args, **options)

    monkeypatch.setattr(nnf, "scaled_dot_product_attention", watched)
    learning = fast.attend(q, k, v, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        reading = fast.attend(q, k, v, is_causal=True, enable_gqa=True)
        after = fast.attend(q, k.float(), v.float(), attn_mask=later, enable_gqa=True)
    for y in learning, reading, after:
        assert y.dtype == torch.bfloat16
        close(y.detach().float(), expected, 1e-2)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert dtypes == [fp32, bf16 if amx else fp32, fp32]

    dtypes.clear()
    monkeypatch.setattr(fast, "LONG", 9)
    frozen = fast.attend(q, k, v, is_causal=True, enable_gqa=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    long = fast.attend(q, k, v, is_causal=True, enable_gqa=True)
    assert dtypes == [fp32, bf16 if avx else fp32]
    of_bf16 = torch.autograd.grad(long.float().square().sum(), leaves)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    y = real(*exact, later, enable_gqa=True)
    for got, dx in zip(of_bf16, torch.autograd.grad(y.square().sum(), exact)):
        close(got.float(), dx, 3e-2)
    close(frozen.float(), long.detach().float(), 1e-2)


# ------------------------------------------------------------------------------------------------
# A model that uses all of it


def parts_exchanged(model: nn.Module) -> list[str]:
    """What is not PyTorch's own any more: classes of modules, and functions that modules hold."""
    found = []
    for module in model.modules():
        if type(module) in (fast.Linear, fast.RMSNorm):
            found.append(type(module).__name__)
        else:
            assert type(module) not in (nn.Linear, nn.RMSNorm)
        for name in ("attend", "gate", "linear", "multiply"):
            if hasattr(module, name):
                assert getattr(module, name) is getattr(fast, name)
                found.append(name)
    return found


@pytest.mark.parametrize("kind", CONNECTORS)
def test_use_changes_no_parameter(kind):
    """state_dict's keys, the parameters themselves, their values, and hooks stay."""
    small = ConnectorConfig(kind, table_size=37, n_latents=5, depth=1, n_heads=4, n_kv_heads=2,
                            head_dim=6)
    model = randomise(AlignVLM(AlignVLMConfig(VISION, small_llama(), small)))
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    called = []
    hooked = model.llm.layers[0].mlp.up_proj
    hooked.register_forward_hook(lambda *_: called.append("up_proj"))
    fast.use(model)
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is p for name, p in parameters.items())
    state = model.state_dict()
    assert list(state) == list(values)
    assert all(torch.equal(state[name], p) for name, p in values.items())
    model.llm(torch.arange(5)[None])
    assert called == ["up_proj"]
    model.load_state_dict(values)
    found = parts_exchanged(model)
    llm = model.llm.config
    assert found.count("attend") == found.count("gate") == llm.n_layers
    assert found.count("linear") == 1
    assert found.count("multiply") == (kind in ("align", "ovis"))
    assert found.count("RMSNorm") >= 2 * llm.n_layers + 1


def outputs(vlm: AlignVLM) -> dict[str, Tensor]:
    """Of packed rows: F, F', hidden states, loss and gradients. And of cached decoding."""
    dtype = vlm.llm.embed_tokens.weight.dtype
    tokens, labels, pixels, lengths = row_of(SAMPLES)
    pixels = pixels.to(dtype)
    found = {"F": vlm.vision(pixels)}
    found["F'"] = vlm.connector(found["F"], vlm.llm.embed_tokens.weight)
    H = vlm.embed(tokens, pixels)
    found["packed"] = vlm.llm.hidden(H, lengths)
    vlm.zero_grad()
    loss = vlm(tokens, labels, pixels, lengths)
    loss.backward()
    found["loss"] = loss
    found |= gradients_of(vlm)
    with torch.inference_mode():
        cache = vlm.llm.new_cache(2, 11)
        x = H[:, :20].view(2, 10, -1)
        found["prompt"] = vlm.llm.hidden(x, None, cache, torch.arange(10).expand(2, -1))
        found["step"] = vlm.llm.hidden(x[:, :1], None, cache, torch.tensor([[10], [4]]))
    return {name: p.detach().double() for name, p in found.items()}


MODELS = {"untied": dict(), "tied": dict(tie_embeddings=True, head_dim=10),
          "one group": dict(n_kv_heads=4)}


@pytest.mark.parametrize("llm", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_uses_it_is_as_near_to_the_truth(llm, dtype, amd):
    """Outputs and gradients, beside the plain model's and the same numbers in fp64.

    In fp32 they are equal within rounding; in bf16 they are no further from the truth.
    """
    plain = small_vlm(hidden_size=64, intermediate_size=96, **MODELS[llm]).to(dtype)
    used = copy.deepcopy(plain)
    fast.use(used)
    truth = outputs(copy.deepcopy(plain).double())
    theirs, ours = outputs(plain), outputs(used)
    for name, exact in truth.items():
        scale = exact.abs().max().item()
        if name.endswith("k_proj.bias"):        # 0 in theory: rounding noise
            scale = truth[name.replace("bias", "weight")].abs().max().item()
        if dtype == torch.float32:
            close(ours[name], theirs[name], 1e-5, scale)
        else:
            noise = (theirs[name] - exact).square().mean().sqrt().item()
            error = (ours[name] - exact).square().mean().sqrt().item()
            assert error <= 1.5 * noise + 2 ** -8 * scale, name


@pytest.mark.parametrize("kind", ["align", "ovis"])
def test_a_mixture_in_blocks_and_cells(kind, amd, monkeypatch):
    """Through the connector's hook: F' and gradients are the plain connector's."""
    monkeypatch.setattr("connector.BLOCK_BYTES", 1)
    monkeypatch.setattr(fast, "CELL", 8)
    plain = randomise(new_connector(ConnectorConfig(kind, table_size=37), 12, 24, 41))
    used = copy.deepcopy(plain)
    fast.use(used)
    g, results = torch.randn(50, 24), []
    for connector in (plain, used):
        torch.manual_seed(1)
        F = torch.randn(50, 12, requires_grad=True)
        E_text = torch.randn(41, 24, requires_grad=True)
        F_align = connector(F, E_text)
        F_align.backward(g)
        parameters = [p.grad for p in connector.parameters()]
        results.append([F_align.detach(), F.grad, *parameters])
        if kind == "align":
            results[-1].append(E_text.grad)
    for ours, theirs in zip(results[1], results[0], strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_tokens_are_those_of_the_plain_model(tied, dtype, amd):
    vlm = small_vlm(scale=0.3 if tied else 3.0, tie_embeddings=tied, n_layers=3).to(dtype)
    prompts = [(tokens, pixels.to(dtype)) for tokens, pixels in PROMPTS]
    expected = generated(vlm, prompts)
    assert max(len(set(answer)) for answer in expected) > 3         # no rut
    fast.use(vlm)
    assert generated(vlm, prompts) == expected
    fast.use(vlm, inference=True)
    assert generated(vlm, prompts) == expected
    assert [generated(vlm, [p])[0] for p in prompts] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_laid_out_give_the_same_tokens(tied, dtype):
    """One by one and in a batch, by one call of `use` and by two.

    But for bf16 no matrices are laid out, and E_text never.
    """
    vlm = small_vlm(tie_embeddings=tied, hidden_size=64, head_dim=32).to(dtype)
    E_text = vlm.llm.embed_tokens.weight
    prompts = [(tokens, pixels.to(dtype)) for tokens, pixels in PROMPTS]
    fast.use(vlm)
    expected = [generated(vlm, [p])[0] for p in prompts]
    can = fast.reads_laid_out(E_text)
    for _ in range(2):
        fast.use(vlm, inference=True)
        assert [generated(vlm, [p])[0] for p in prompts] == expected
        assert generated(vlm, prompts) == expected
        assert vlm.llm.embed_tokens.weight is E_text and not E_text.is_mkldnn
        assert vlm.llm.head.is_mkldnn == can
        for module in vlm.llm.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.is_mkldnn == can
            elif isinstance(module, nn.RMSNorm):
                assert module.laid_out is not None


@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_decodes_with_its_own_weights(inference):
    """A deep copy shares nothing with the model that it was made of, nor its cache's maker."""
    vlm = small_vlm(scale=3.0)
    other = small_vlm(seed=1, scale=3.0)
    expected, others = generated(vlm, PROMPTS), generated(other, PROMPTS)
    assert expected != others
    fast.use(vlm)
    copied = copy.deepcopy(vlm)
    copied.load_state_dict(other.state_dict())
    if inference:
        fast.use(copied, inference=True)
        copied = copy.deepcopy(copied)
    assert isinstance(copied.llm.new_cache, functools.partial)
    assert copied.llm.new_cache.args[-1] is copied.llm
    assert vlm.llm.new_cache.args[-1] is vlm.llm
    assert generated(copied, PROMPTS) == others
    assert generated(vlm, PROMPTS) == expected
    vlm.bfloat16()
    assert vlm.llm.new_cache(1, 4).k[0].dtype == torch.float32
    assert vlm.llm.new_cache(1, 4, dtype=torch.bfloat16).k[0].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------
# What is for a GPU, as far as a CPU can show it; the rest is in tests/gpu


@pytest.mark.parametrize("B, heads, kv_heads, L, reach", [(1, 4, 2, 1, 9), (3, 6, 2, 1, 5),
                                                          (2, 5, 1, 4, 7), (1, 3, 3, 2, 6)])
def test_grouped_queries_as_rows(B, heads, kv_heads, L, reach):
    """Each under the mask of its own place and row."""
    q = torch.randn(B, heads, L, 6)
    k, v = torch.randn(2, B, kv_heads, reach, 6)
    seen = torch.rand(B, 1, L, reach) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(B, 1, L, reach).masked_fill(~seen, -math.inf)
    expected = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    close(cuda.attend_in_groups(q, k, v, mask), expected)


@pytest.mark.parametrize("can_record", [True, False])
def test_steps_are_recorded_once_a_cache(can_record, monkeypatch):
    """The first is taken as it is, the second recorded; where that fails, all are as they are."""
    recorded, replayed = [], []

    class Recording:
        def __init__(self, *step):
            if not can_record:
                raise RuntimeError("no graph")
            step, _, cache, _ = step
            recorded.append(cache.length)
            self.step = lambda ids, position: step(ids, cache, position)

        def replay(self, ids, position):
            replayed.append(position)
            return self.step(ids, position)

    monkeypatch.setattr(cuda, "Recording", Recording)
    vlm = small_vlm(scale=3.0)
    expected = generated(vlm, PROMPTS)
    for _ in range(2):
        cuda.prepare_to_answer(vlm.llm)
    assert vlm.llm.next_hidden.step == Llama.next_hidden.__get__(vlm.llm)
    if can_record:
        assert generated(vlm, PROMPTS) == generated(vlm, PROMPTS) == expected
    else:
        with pytest.warns(UserWarning, match="no graph"):
            assert generated(vlm, PROMPTS) == expected
        assert generated(vlm, PROMPTS) == expected
    times = 2 if can_record else 0
    assert len(recorded) == times and len(replayed) == times * (STEPS - 2)


# ------------------------------------------------------------------------------------------------
# Before FSDP2


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:.*returned a view tensor")
def test_use_comes_before_fully_shard_and_memory(one_process, amd):
    """On the meta device, then sharded, then given memory and weights: it learns as a plain one.

    And it decodes, and saves the same tensors.
    """
    plain = small_vlm(scale=3.0)
    row = row_of(SAMPLES)
    loss = plain(*row)
    loss.backward()
    with torch.device("meta"):
        used = AlignVLM(plain.config)
    fast.use(used)
    shard(used, torch.device("cpu"))
    assert parts_exchanged(used)
    used.to_empty(device="cpu")
    with torch.no_grad():
        for p, value in zip(used.parameters(), plain.parameters(), strict=True):
            p.to_local().copy_(value)
    assert list(used.state_dict()) == list(plain.state_dict())
    our_loss = used(*row)
    our_loss.backward()
    close(our_loss.detach(), loss.detach())
    gradients = gradients_of(plain)
    for name, p in used.named_parameters():
        weight = gradients[name.replace("k_proj.bias", "k_proj.weight")]
        close(p.grad.full_tensor(), gradients[name], scale=weight.abs().max().item())
    # As train.py asks its held-out questions: a plain copy of the weights answers.
    whole = AlignVLM(plain.config).eval()
    whole.load_state_dict({name: p.full_tensor() for name, p in used.state_dict().items()})
    assert generated(whole, PROMPTS) == generated(plain, PROMPTS)
