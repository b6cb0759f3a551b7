"""How fast it is, measured beside transformers in one run.

    pip install 'transformers>=5'
    python bench.py                                     # all of it
    python bench.py prefill decode --json               # some, a JSON line per row
    python bench.py decode --llm meta-llama/Llama-3.2-1B    # released weights, not random ones
    python bench.py train --preset llama-3.2-1b --alone # on a GPU: packed 10-tile pages, ours alone

Both sides do the same with the same weights, in turns, and the median counts: absolute times on a
shared CPU mean little, ratios do. Ours is made fast by plumbing/fast.py, as in sample.py and
train.py. of_ceiling is the share of the machine's best in the same run: a large matrix product; for
decoding the model's matrices times the step's vectors (on a GPU a large copy); for loading a copy.
"""
import argparse
import copy
import functools
import io
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from connector import Align, MLPConnector
from model import ALIGNVLM_PRESETS, IGNORE, AlignVLM, AlignVLMConfig, Llama, LlamaConfig
from paper.plan import step_flops
from plumbing import fast
from plumbing.examples import IMAGE
from plumbing.images import read_image
from plumbing.processes import keep_heap, run_main
from plumbing.settings import InputError
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, on_canvas, tile, tile_boxes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FP32, BF16 = torch.float32, torch.bfloat16
# SigLIP base-patch16-224 and SmolLM2-135M: what two CPU cores can train.
SMALL = AlignVLMConfig(
    SigLIPConfig(768, 12, 12, 3072, 224, 16),
    LlamaConfig(vocab_size=49_152, hidden_size=576, n_layers=30, n_heads=9, n_kv_heads=3,
                intermediate_size=1536, rope_factor=1.0))

# -------------------------------------------------------------------------------------------------
# Clocks, rows and ceilings


def seconds(work: Callable) -> float:
    """Of one call; on a GPU by its own clock."""
    if not GPU:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def alternate(ours: Callable, theirs: Callable | None, repeats: int,
              clock: Callable = seconds) -> tuple[float, float | None]:
    """The median seconds of either, called in turns; first calls are not counted.

    Tensors that the two return must agree.
    """
    sides = [side for side in (ours, theirs) if side]
    first = [side() for side in sides]
    if theirs and isinstance(first[0], Tensor):
        worst = (first[0] - first[1]).abs().max() / first[1].abs().max()
        assert worst < 0.1, f"the two sides do not do the same: {worst}"
    times = [[clock(side) for side in sides] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times)]
    return medians[0], medians[1] if theirs else None


def row(work: str, ours_s: float, theirs_s: float | None, ceiling_s: float | None = None,
        extra_gb: float | None = None) -> dict:
    """A line of the table; None is what was not, or cannot be, measured."""
    return {"work": work, "ours_s": ours_s, "theirs_s": theirs_s,
            "ratio": ours_s / theirs_s if theirs_s else None,
            "of_ceiling": ceiling_s / ours_s if ceiling_s else None, "extra_gb": extra_gb}


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, by the faster of PyTorch's and ours (plumbing/fast.py)."""
    n = 8192 if GPU else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    b = torch.randn(n, n, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        plain_s, _ = alternate(lambda: a @ b, None, 5)
        fast_s, _ = alternate(lambda: fast.linear(a, b), None, 5)
    return 2 * n ** 3 / min(plain_s, fast_s)


def extra_gb(work: Callable) -> tuple[float | None, float]:
    """GB that a call has at its peak beyond what was there before, and its seconds.

    None where the system cannot tell.
    """
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(work)
        return (torch.cuda.max_memory_allocated() - before) / 1e9, taken
    try:
        Path("/proc/self/clear_refs").write_text("5")           # the peak begins anew
    except OSError:
        return None, seconds(work)
    before = resident_bytes("VmRSS")
    taken = seconds(work)
    return (resident_bytes("VmHWM") - before) / 1e9, taken


def resident_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s*(\d+)", status)[1]) * 1024


# -------------------------------------------------------------------------------------------------
# The models of both sides


def preset(args: argparse.Namespace) -> AlignVLMConfig:
    return ALIGNVLM_PRESETS[args.preset] if args.preset else SMALL


def our_llama(args: argparse.Namespace, dtype: torch.dtype) -> Llama:
    """Still without what is fast: theirs is made of its tensors first."""
    if args.llm:
        return Llama.from_pretrained(args.llm, dtype, DEVICE).eval()
    with DEVICE:                # a CPU takes a minute for random weights of 3 GB
        llm = Llama(preset(args).llm)
    llm.init_weights()
    return llm.to(dtype).eval()


def random_vlm(args: argparse.Namespace, dtype: torch.dtype) -> AlignVLM:
    with DEVICE:
        model = AlignVLM(preset(args))
    model.init_weights()
    return model.to(dtype)


def their_llama(ours: Llama) -> nn.Module:
    """transformers' LlamaForCausalLM on the very tensors of ours."""
    import transformers
    c = ours.config
    rope = {"rope_type": "llama3", "rope_theta": c.rope_theta, "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_freq_factor, "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_length}
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        intermediate_size=c.intermediate_size, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_embeddings, max_position_embeddings=131_072,
        rope_parameters=rope, attn_implementation="sdpa")
    theirs = transformers.LlamaForCausalLM(config).to(DEVICE)
    weights = {name: p for name, p in ours.state_dict().items() if name != "lm_head.weight"}
    theirs.model.load_state_dict(weights, assign=True)
    theirs.lm_head.weight = nn.Parameter(ours.head.data)
    theirs.tie_weights()
    return theirs.eval()


def their_siglip(ours: SigLIP) -> nn.Module:
    """transformers' SiglipVisionModel, without the pooling head, on the very tensors of ours."""
    import transformers
    c = ours.config
    config = transformers.SiglipVisionConfig(
        hidden_size=c.hidden_size, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        intermediate_size=c.intermediate_size, image_size=c.image_size, patch_size=c.patch_size,
        layer_norm_eps=c.layer_norm_eps, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
        attn_implementation="sdpa")
    theirs = transformers.SiglipVisionModel(config).to(DEVICE)
    tower = getattr(theirs, "vision_model", theirs)     # a level of its own before transformers 5
    tower.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval()


# -------------------------------------------------------------------------------------------------
# Pages and vision


def page_file(width: int, height: int, kind: str) -> bytes:
    """A page full of text as a PNG or JPEG file."""
    rng = random.Random(0)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=height // 60)
    for y in range(height // 20, height * 19 // 20, height // 45):
        words = " ".join(str(rng.randrange(10 ** rng.randint(1, 9))) for _ in range(12))
        pen.text((width // 20, y), words, "black", font)
    file = io.BytesIO()
    page.save(file, kind)
    return file.getvalue()


def pages(args: argparse.Namespace) -> Iterator[dict]:
    """Decoding, tiling and normalising a page on one core.

    Against SiglipImageProcessorPil on the same boxes.
    """
    from transformers import SiglipImageProcessorPil
    config = SIGLIP_PRESETS["so400m-patch14-384"]
    processor = SiglipImageProcessorPil()
    side = config.image_size

    def ours(data: bytes) -> Tensor:
        return tile(read_image(io.BytesIO(data)), config)

    def theirs(data: bytes) -> Tensor:
        page = Image.open(io.BytesIO(data)).convert("RGB")
        boxes = tile_boxes(*page.size, config)
        pixels = np.zeros((len(boxes), 3, side, side), dtype=np.float32)
        for canvas, (left, top, right, bottom) in zip(pixels, boxes):
            x, y, width, height = on_canvas(right - left, bottom - top, side)
            done = processor(page.crop((left, top, right, bottom)), return_tensors="np",
                             size={"height": height, "width": width})
            canvas[:, y:y + height, x:x + width] = done["pixel_values"][0]
        return torch.from_numpy(pixels)

    for width, height, kind in [(850, 1100, "PNG"), (1700, 2200, "PNG"), (1700, 2200, "JPEG"),
                                (500, 400, "JPEG")]:
        data = page_file(width, height, kind)
        difference = (ours(data) - theirs(data)).abs().max().item()
        times = alternate(lambda: ours(data), lambda: theirs(data), args.repeats)
        yield {**row(f"pages-{width}x{height}-{kind.lower()}", *times), "difference": difference}


@torch.inference_mode()
def vision(args: argparse.Namespace) -> Iterator[dict]:
    """4 tiles through SigLIP so400m."""
    config = (ALIGNVLM_PRESETS[args.preset] if args.preset else AlignVLMConfig()).vision
    no_llm = LlamaConfig(hidden_size=0, n_layers=0)     # the encoder's operations alone are counted
    for dtype, name in [(FP32, "fp32"), (BF16, "bf16")]:
        siglip = SigLIP(config).to(DEVICE, dtype).eval()
        siglip.init_weights()
        their_model = None if args.alone else their_siglip(siglip)
        fast.use(siglip, inference=True)
        side = config.image_size
        pixels = torch.randn(4, 3, side, side, device=DEVICE, dtype=dtype)

        def theirs() -> Tensor:
            return their_model(pixels).last_hidden_state

        times = alternate(lambda: siglip(pixels), None if args.alone else theirs, args.repeats)
        flops = step_flops(AlignVLMConfig(config, no_llm), (), Counter(tiles=4))
        yield row(f"vision-{name}", *times, flops / product_rate(dtype))


# -------------------------------------------------------------------------------------------------
# The LLM


@torch.inference_mode()
def prefill(args: argparse.Namespace) -> Iterator[dict]:
    """A prompt of 1,024 tokens until the logits of the next one.

    Both sides keep keys and values.
    """
    L = 1024
    for dtype, name in [(FP32, "fp32"), (BF16, "bf16")]:
        llm = our_llama(args, dtype)
        their_llm = None if args.alone else their_llama(llm)
        fast.use(llm, inference=True)
        tokens = torch.randint(llm.config.vocab_size, (1, L), device=DEVICE)

        def ours() -> list[int]:
            return next(llm.generate(llm.embed_tokens(tokens), [L], set(), 1))

        def theirs() -> list[int]:
            return their_llm(tokens, logits_to_keep=1).logits.argmax(-1).tolist()

        times = alternate(ours, None if args.alone else theirs, args.repeats)
        counts = Counter(tokens=L, supervised=1, squares=L ** 2)
        flops = step_flops(AlignVLMConfig(llm=llm.config), (), counts)
        yield row(f"prefill-{name}", *times, flops / product_rate(dtype))


@torch.inference_mode()
def decode(args: argparse.Namespace) -> Iterator[dict]:
    """Seconds per step of 128 after prompts of 512 tokens, greedily; the first three do not count.

    batch8 has 8 prompts of 288 to 512.
    """
    n_new = 128
    for name, dtype, lengths in [("fp32", FP32, [512]), ("bf16", BF16, [512]),
                                 ("batch8", FP32, [512 - 32 * i for i in range(8)])]:
        llm = our_llama(args, dtype)
        V = llm.config.vocab_size
        prompts = [torch.randint(V, (n,), device=DEVICE) for n in lengths]
        theirs = None if args.alone else their_decoding(llm, prompts, n_new)
        fast.use(llm, inference=True)
        x = llm.embed_tokens(pad_sequence(prompts, batch_first=True))           # (B, L, D)

        def ours() -> float:
            steps = llm.generate(x, lengths, set(), n_new + 1)
            times = [time.perf_counter() for _ in steps]
            # The first time is the prompt's. On a GPU a step without a graph follows, then one that
            # records the graph of all others.
            return (times[-1] - times[3]) / (n_new - 3)

        times = alternate(ours, theirs, args.repeats, clock=lambda side: side())
        yield row(f"decode-{name}", *times, decoding_ceiling(llm, len(lengths), dtype))


def their_decoding(llm: Llama, prompts: list[Tensor], n_new: int) -> Callable[[], float]:
    """transformers' decoding, with the cache that is faster here: its seconds per step."""
    their_llm = their_llama(llm)
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")          # (B, L)
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True,
                        padding_side="left")                                    # (B, L)

    def generate(new: int, **cache) -> float:
        times = []          # the first is the prompt's
        streamer = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()),
                                   end=lambda: None)
        their_llm.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new,
                           do_sample=False, pad_token_id=0, streamer=streamer, **cache)
        return (times[-1] - times[1]) / (new - 1)

    # Their default, which is dynamic, and a static one.
    caches = [{}, {"cache_implementation": "static", "disable_compile": not GPU}]
    tried = []
    for cache in caches:
        generate(9, **cache)
        tried.append(generate(17, **cache))
    faster = caches[tried.index(min(tried))]
    return lambda: generate(n_new + 1, **faster)


def decoding_ceiling(llm: Llama, batch: int, dtype: torch.dtype) -> float:
    """Seconds that the machine takes at least for the matrices of a step."""
    matrices = [p for p in llm.layers.parameters() if p.ndim == 2] + [llm.head]
    if GPU:
        numbers = torch.ones(2, 2 ** 28, device=DEVICE)     # a copy reads one half, writes another
        copy_s, _ = alternate(lambda: numbers[1].copy_(numbers[0]), None, 5)
        return sum(W.nbytes for W in matrices) / numbers.nbytes * copy_s
    sizes = {W.shape[1] for W in matrices}
    vectors = {D: torch.randn(batch, D, device=DEVICE, dtype=dtype) for D in sizes}

    def products() -> None:
        for W in matrices:
            fast.linear(vectors[W.shape[1]], W)

    ceiling_s, _ = alternate(products, None, 20)
    return ceiling_s


def load(args: argparse.Namespace) -> Iterator[dict]:
    """A folder in hub format, in bf16, into a model that is in memory.

    The ceiling is a copy of as many bytes.
    """
    from transformers import LlamaForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        llm = our_llama(args, BF16)
        their_llama(llm).save_pretrained(folder)
        numbers = torch.ones(sum(p.numel() for p in llm.parameters()), dtype=BF16)

        def touch(model: nn.Module) -> None:
            for p in model.parameters():    # a mapped file is in memory when every page was read
                p.flatten()[::2048].max()

        def ours() -> None:
            touch(Llama.from_pretrained(folder, device=DEVICE))

        def theirs() -> None:
            touch(LlamaForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE))

        times = alternate(ours, theirs, args.repeats)
        copy_s, _ = alternate(lambda: numbers.clone(), None, 5)
        yield row("load", *times, copy_s)


# -------------------------------------------------------------------------------------------------
# The connector


def connector(args: argparse.Namespace) -> Iterator[dict]:
    """Align forward and backward on one tile and on ten.

    Against the naive equations under autograd (one tile only). extra_gb is beyond weights and
    gradients. of_ceiling counts the six products that autograd does.
    """
    config = ALIGNVLM_PRESETS[args.preset or "llama-3.2-1b"]
    dtype = BF16 if GPU else FP32
    d, D, V = config.vision.hidden_size, config.llm.hidden_size, config.llm.vocab_size
    with DEVICE:
        align = Align(d, D, V).to(dtype)
    E_text = nn.Parameter(torch.randn(V, D, device=DEVICE, dtype=dtype))
    E_text.data *= D ** -0.5
    align.init_weights(E_text)
    fast.use(align)
    weights = [*align.parameters(), E_text]
    rate = product_rate(dtype)
    for n in (729, 7290):
        F = torch.randn(n, d, device=DEVICE, dtype=dtype)

        def step(F_align_of: Callable) -> None:
            for p in weights:
                p.grad = None
            F_align_of(F, E_text).square().sum().backward()

        for p in weights:
            p.grad = None
        extra, first_s = extra_gb(lambda: step(align))
        if extra is not None:
            extra -= sum(p.grad.nbytes for p in weights) / 1e9
        if n > 729 and not GPU:     # ten tiles take minutes: the first call is the only one
            times = first_s, None
        else:
            theirs = None
            if n == 729 and not args.alone:
                theirs = functools.partial(step, functools.partial(naive, align))
            times = alternate(lambda: step(align), theirs, args.repeats)
        yield row(f"connector-{n}", *times, 6 * 2 * n * D * V / rate, extra)


def naive(align: Align, F: Tensor, E_text: Tensor) -> Tensor:
    """Equations 1 and 2 in plain PyTorch: F (n, d) -> F' (n, D).

    nnf.linear, since fast.use has exchanged the products of align.W1 and align.W2.
    """
    h = align.norm_D(nnf.linear(F, align.W1.weight))                            # (n, D)
    logits = align.norm_V(nnf.linear(h, align.W2.weight))                       # (n, V)
    return nnf.softmax(logits, dim=-1) @ E_text                                 # (n, D)


@torch.inference_mode()
def answer(args: argparse.Namespace) -> Iterator[dict]:
    """A page and 16 tokens, 32 tokens of answer.

    With Align, and (theirs) with an MLP connector in its place.
    """
    dtype = BF16 if GPU else FP32
    T = 10 if args.preset else 1
    model = random_vlm(args, dtype)
    v = model.config.vision
    align = model.connector
    mlp = MLPConnector(v.hidden_size, model.config.llm.hidden_size).to(DEVICE, dtype)
    fast.use(model, inference=True)
    fast.use(mlp, inference=True)
    image = torch.full((T * model.config.tile_tokens,), IMAGE)
    tokens = torch.cat([image, torch.arange(16)])                               # (L,)
    pixels = torch.randn(T, 3, v.image_size, v.image_size)

    def generate(connector: nn.Module) -> None:
        model.connector = connector
        list(model.generate([tokens], [pixels], set(), 32))

    times = alternate(lambda: generate(align), lambda: generate(mlp), args.repeats)
    yield row("answer-align-vs-mlp", *times)


# -------------------------------------------------------------------------------------------------
# Training


def train(args: argparse.Namespace) -> Iterator[dict]:
    """A step (loss, gradients, clipping, AdamW) on 8 samples of a tile and 40 to 96 tokens.

    With --preset on 2 pages of 10 tiles. The other side is transformers' towers, joined by the
    naive Align. Both have the heap that train.py sets.
    """
    keep_heap()
    dtype = BF16 if GPU else FP32
    model = random_vlm(args, dtype)
    B, T = (2, 10) if args.preset else (8, 1)
    n = T * model.config.tile_tokens            # visual tokens of a sample
    V, side = model.config.llm.vocab_size, model.config.vision.image_size
    rng = random.Random(0)
    texts = [torch.randint(V, (rng.randint(40, 96),)) for _ in range(B)]
    pixels = torch.randn(B * T, 3, side, side, device=DEVICE, dtype=dtype)
    theirs = None if args.alone else their_training_step(model, texts, pixels)
    fast.use(model)
    if GPU:
        for block in [*model.vision.encoder["layers"], *model.llm.layers]:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, labels, lengths = packed_row(texts, n)
    supervised = sum(map(len, texts))

    def ours() -> Tensor:
        loss = model(tokens, labels, pixels, lengths) / supervised
        return update(loss, model, optimizer)

    times = alternate(ours, theirs, args.repeats)
    counts = Counter(tokens=sum(lengths), supervised=supervised, tiles=B * T,
                     squares=sum(n ** 2 for n in lengths))
    flops = step_flops(model.config, ("vision", "connector", "llm"), counts)
    yield row("train", *times, flops / product_rate(dtype))


def packed_row(texts: list[Tensor], n: int) -> tuple[Tensor, Tensor, list[int]]:
    """Texts, each after n visual tokens -> tokens and labels (1, L), lengths.

    They are on the CPU, as in train.py.
    """
    tokens, labels = [], []
    for text in texts:
        tokens += [torch.full((n,), IMAGE), text]
        labels += [torch.full((n - 1,), IGNORE), text, torch.tensor([IGNORE])]
    return torch.cat(tokens)[None], torch.cat(labels)[None], [n + len(text) for text in texts]


def their_training_step(model: AlignVLM, texts: list[Tensor],
                        pixels: Tensor) -> Callable[[], Tensor]:
    """The same step with transformers' towers on copies of the weights.

    Rows are padded on the right, where neither the loss nor a causal LLM needs a mask; logits are
    those of the text alone.
    """
    siglip = their_siglip(copy.deepcopy(model.vision))
    align = copy.deepcopy(model.connector)
    llama = their_llama(copy.deepcopy(model.llm))
    towers = nn.ModuleList([siglip, align, llama])
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-5, fused=True)
    tokens = pad_sequence(texts, batch_first=True).to(DEVICE)                   # (B, longest)
    targets = pad_sequence(texts, batch_first=True, padding_value=IGNORE).to(DEVICE)
    B = len(texts)

    def step() -> Tensor:
        E_text = llama.get_input_embeddings().weight                            # (V, D)
        F = siglip(pixels).last_hidden_state                                    # (B T, N, d)
        F_align = align.p_vocab(F) @ E_text             # (B T, N, D), equations 1 and 2
        visual = F_align.view(B, -1, E_text.shape[1])                           # (B, T N, D)
        x = torch.cat([visual, nnf.embedding(tokens, E_text)], dim=1)   # (B, T N + longest, D)
        kept = tokens.shape[1] + 1
        # (B, longest, V)
        logits = llama(inputs_embeds=x, logits_to_keep=kept, use_cache=False).logits[:, :-1]
        loss = nnf.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return update(loss, towers, optimizer)
    return step


def update(loss: Tensor, modules: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """The rest of a step; returns the loss."""
    loss.backward()
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# -------------------------------------------------------------------------------------------------
# The command line

# Each with how often it is repeated. The last one changes how memory is allocated.
WORKS = {"pages": (pages, 20), "vision": (vision, 3), "prefill": (prefill, 5),
         "decode": (decode, 3), "connector": (connector, 3), "load": (load, 5),
         "answer": (answer, 5), "train": (train, 5)}


def table_line(cells) -> str:
    name, *numbers = map(cell_text, cells)
    return f"{name:>26}" + "".join(f"{number:>13}" for number in numbers)


def cell_text(cell: str | float | None) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.4g}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", nargs="*", help=f"which of {', '.join(WORKS)} (default: all)")
    add("--preset", choices=ALIGNVLM_PRESETS, help="sizes (default: SigLIP so400m for vision, "
        "SmolLM2-135M for prefill, decode and load, SigLIP base with it for answer and train, "
        "Llama-3.2-1B for connector)")
    add("--llm", help="folder or name of a released Llama for prefill, decode and load (default: "
        "random weights)")
    add("--alone", action="store_true", help="ours alone (vision, prefill, decode, connector, "
        "train)")
    add("--repeats", type=int, help="calls of each side (default: 3 to 20, fewer of what takes "
        "longer)")
    add("--threads", type=int, help="CPU threads (default: all cores; pages always takes one)")
    add("--json", action="store_true", help="a JSON line per row instead of a table")
    args = parser.parse_args()
    unknown = [name for name in args.work if name not in WORKS]
    if unknown:
        parser.error(f"no work called {', '.join(unknown)}: there is {', '.join(WORKS)}")
    if any(n is not None and n < 1 for n in (args.repeats, args.threads)):
        parser.error("--repeats and --threads are at least 1")
    return args


def print_rows(rows: Iterator[dict], as_json: bool) -> None:
    """Each as soon as it is there; above a table stand its columns."""
    for i, cells in enumerate(rows):
        if as_json:
            print(json.dumps(cells), flush=True)
            continue
        if i == 0:
            print(table_line(cells))
        print(table_line(cells.values()), flush=True)


def main() -> None:
    args = parse_args()
    threads = args.threads or torch.get_num_threads()
    torch.manual_seed(0)
    for name, (work, repeats) in WORKS.items():     # in their order: train keeps its heap
        if args.work and name not in args.work:
            continue
        torch.set_num_threads(1 if name == "pages" else threads)
        options = argparse.Namespace(**{**vars(args), "repeats": args.repeats or repeats})
        try:
            print_rows(work(options), args.json)
        except ImportError as error:
            raise InputError(f"{name} needs `pip install 'transformers>=5'` ({error})") from None


if __name__ == "__main__":
    run_main(main)
