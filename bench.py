"""How fast it is, measured beside transformers in one run.

    pip install transformers
    python bench.py                                     # all of it
    python bench.py prefill decode --json               # some, a JSON line per row
    python bench.py decode --llm Llama-3.2-1B           # released weights; without, random ones of SmolLM2-135M's shape
    python bench.py train --preset llama-3.2-1b --alone # on a GPU: packed 10-tile pages, ours alone

Both sides do the same with the same weights, in turns, and the median counts: absolute times on a shared CPU mean
little, ratios do. of_ceiling is the share of the machine's best in the same run: a large matrix product, for decoding
the model's matrices times one vector (on a GPU a large copy), for loading a copy.
"""
import argparse
import copy
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

from connector import MLP, Align
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, AlignVLM, AlignVLMConfig, Llama, LlamaConfig
from paper.plan import step_flops
from plumbing.fast import linear
from plumbing.processes import keep_heap, run_main
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig, on_canvas, tile, tile_boxes
from plumbing.images import read_image

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FP32, BF16 = torch.float32, torch.bfloat16
# SigLIP base-patch16-224 and SmolLM2-135M: what two CPU cores can train.
SMALL = AlignVLMConfig(SigLIPConfig(768, 12, 12, 3072, 224, 16),
                       LlamaConfig(vocab_size=49_152, hidden_size=576, n_layers=30, n_heads=9, n_kv_heads=3,
                                   intermediate_size=1536, rope_factor=1.0))


def seconds(work: Callable) -> float:
    """Of one call; on a GPU by its own clock."""
    if not GPU:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def alternate(ours: Callable, theirs: Callable | None, repeats: int, clock=seconds) -> tuple[float, float | None]:
    """The median seconds of either, called in turns, first calls not counted. Tensors that they return must agree."""
    sides = [side for side in (ours, theirs) if side]
    first = [side() for side in sides]
    if theirs and isinstance(first[0], Tensor):
        worst = (first[0] - first[1]).abs().max() / first[1].abs().max()
        assert worst < 0.1, f"the two sides do not do the same: {worst}"
    times = [[clock(side) for side in sides] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times)]
    return medians[0], medians[1] if theirs else None


def row(work: str, ours_s: float, theirs_s: float | None, ceiling_s=None, extra_gb=None) -> dict:
    """A line of the table; None is what was not, or cannot be, measured."""
    return {"work": work, "ours_s": ours_s, "theirs_s": theirs_s, "ratio": ours_s / theirs_s if theirs_s else None,
            "of_ceiling": ceiling_s / ours_s if ceiling_s else None, "extra_gb": extra_gb}


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, by the faster of PyTorch's and ours (plumbing/linear.py)."""
    n = 8192 if GPU else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * n ** 3 / min(alternate(product, None, 5)[0] for product in (lambda: a @ b, lambda: linear(a, b)))


def extra_gb(work: Callable) -> tuple[float | None, float]:
    """GB that a call has at its peak beyond what was there before (None where the system cannot tell), and seconds."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = seconds(work)
        return (torch.cuda.max_memory_allocated() - before) / 1e9, taken
    try:
        Path("/proc/self/clear_refs").write_text("5")           # the peak begins anew
    except OSError:
        return None, seconds(work)
    resident = lambda key: int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before, taken = resident("VmRSS"), seconds(work)
    return (resident("VmHWM") - before) / 1e9, taken


def our_llama(args, dtype: torch.dtype) -> Llama:
    if args.llm:
        return Llama.from_pretrained(args.llm, dtype, DEVICE).eval()
    llm = Llama((ALIGNVLM_PRESETS[args.preset] if args.preset else SMALL).llm)
    llm.init_weights()
    return llm.to(DEVICE, dtype).eval()


def their_llama(ours: Llama) -> nn.Module:
    """transformers' LlamaForCausalLM on the very tensors of ours."""
    import transformers
    c = ours.config
    rope = dict(rope_type="llama3", rope_theta=c.rope_theta, factor=c.rope_factor,
                low_freq_factor=c.rope_low_freq_factor, high_freq_factor=c.rope_high_freq_factor,
                original_max_position_embeddings=c.rope_original_length)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        intermediate_size=c.intermediate_size, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=131_072, rope_parameters=rope, attn_implementation="sdpa")).to(DEVICE)
    theirs.model.load_state_dict({k: p for k, p in ours.state_dict().items() if k != "lm_head.weight"}, assign=True)
    theirs.lm_head.weight = nn.Parameter(ours.head.data)
    theirs.tie_weights()
    return theirs.eval()


def their_siglip(ours: SigLIP) -> nn.Module:
    """transformers' SiglipVisionModel, without the pooling head, on the very tensors of ours."""
    import transformers
    c = ours.config
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=c.hidden_size, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        intermediate_size=c.intermediate_size, image_size=c.image_size, patch_size=c.patch_size,
        layer_norm_eps=c.layer_norm_eps, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
        attn_implementation="sdpa")).to(DEVICE)
    tower = getattr(theirs, "vision_model", theirs)        # a level of its own before transformers 5
    tower.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval()


def random_vlm(args, dtype: torch.dtype) -> AlignVLM:
    model = AlignVLM(ALIGNVLM_PRESETS[args.preset] if args.preset else SMALL)
    model.init_weights()
    return model.to(DEVICE, dtype)


def page_file(width: int, height: int, kind: str) -> bytes:
    """A page full of text as a PNG or JPEG file."""
    rng, page = random.Random(0), Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=height // 60)
    for y in range(height // 20, height * 19 // 20, height // 45):
        words = " ".join(str(rng.randrange(10 ** rng.randint(1, 9))) for _ in range(12))
        pen.text((width // 20, y), words, "black", font)
    file = io.BytesIO()
    page.save(file, kind)
    return file.getvalue()


def pages(args) -> Iterator[dict]:
    """Decoding, tiling and normalising a page on one core, against SiglipImageProcessorPil on the same boxes."""
    from transformers import SiglipImageProcessorPil
    config, processor = SIGLIP_PRESETS["so400m-patch14-384"], SiglipImageProcessorPil()
    side = config.image_size

    def theirs(data: bytes) -> Tensor:
        page = Image.open(io.BytesIO(data)).convert("RGB")
        boxes = tile_boxes(*page.size, config)
        pixels = np.zeros((len(boxes), 3, side, side), dtype=np.float32)
        for canvas, (left, top, right, bottom) in zip(pixels, boxes):
            x, y, new_w, new_h = on_canvas(right - left, bottom - top, side)
            done = processor(page.crop((left, top, right, bottom)), size={"height": new_h, "width": new_w},
                             return_tensors="np")["pixel_values"][0]
            canvas[:, y:y + new_h, x:x + new_w] = done
        return torch.from_numpy(pixels)

    for width, height, kind in [(850, 1100, "PNG"), (1700, 2200, "PNG"), (1700, 2200, "JPEG"), (500, 400, "JPEG")]:
        data = page_file(width, height, kind)
        difference = (tile(read_image(io.BytesIO(data)), config) - theirs(data)).abs().max().item()
        times = alternate(lambda: tile(read_image(io.BytesIO(data)), config), lambda: theirs(data), args.repeats)
        yield {**row(f"pages-{width}x{height}-{kind.lower()}", *times), "difference": difference}


@torch.inference_mode()
def vision(args) -> Iterator[dict]:
    """4 tiles through SigLIP so400m."""
    config = (ALIGNVLM_PRESETS[args.preset] if args.preset else AlignVLMConfig()).vision
    for dtype, name in [(FP32, "fp32"), (BF16, "bf16")]:
        ours = SigLIP(config).to(DEVICE, dtype).eval()
        ours.init_weights()
        theirs = None if args.alone else their_siglip(ours)
        pixels = torch.randn(4, 3, config.image_size, config.image_size, device=DEVICE, dtype=dtype)
        times = alternate(lambda: ours(pixels), theirs and (lambda: theirs(pixels).last_hidden_state), args.repeats)
        flops = step_flops(AlignVLMConfig(config, LlamaConfig(hidden_size=0, n_layers=0)), (), Counter(tiles=4))
        yield row(f"vision-{name}", *times, flops / product_rate(dtype))


@torch.inference_mode()
def prefill(args) -> Iterator[dict]:
    """A prompt of 1,024 tokens until the logits of the next one; both sides keep keys and values."""
    for dtype, name in [(FP32, "fp32"), (BF16, "bf16")]:
        llm = our_llama(args, dtype)
        theirs = None if args.alone else their_llama(llm)
        llm.pack()
        tokens = torch.randint(llm.config.vocab_size, (1, 1024), device=DEVICE)
        times = alternate(lambda: next(llm.generate(llm.embed_tokens(tokens), [1024], set(), 1)),
                          theirs and (lambda: theirs(tokens, logits_to_keep=1).logits.argmax(-1).tolist()),
                          args.repeats)
        flops = step_flops(AlignVLMConfig(llm=llm.config), (), Counter(tokens=1024, supervised=1, squares=1024 ** 2))
        yield row(f"prefill-{name}", *times, flops / product_rate(dtype))


@torch.inference_mode()
def decode(args) -> Iterator[dict]:
    """Seconds per step of 128 after prompts of 512 tokens, greedily; batch8 has 8 prompts of 288 to 512."""
    n_new = 128
    for name, dtype, lengths in [("fp32", FP32, [512]), ("bf16", BF16, [512]),
                                 ("batch8", FP32, [512 - 32 * i for i in range(8)])]:
        llm = our_llama(args, dtype)
        prompts = [torch.randint(llm.config.vocab_size, (n,), device=DEVICE) for n in lengths]
        x = llm.embed_tokens(pad_sequence(prompts, batch_first=True))              # (B, L, D), padded on the right
        ids, mask = (pad_sequence(rows, batch_first=True, padding_side="left")
                     for rows in (prompts, [torch.ones_like(p) for p in prompts]))

        def ours() -> float:
            times = [time.perf_counter() for _ in llm.generate(x, lengths, set(), n_new + 1)]
            return (times[-1] - times[0]) / n_new

        def theirs(new: int = n_new + 1) -> float:
            times = []          # the first is the prompt's
            streamer = SimpleNamespace(put=lambda ids: times.append(time.perf_counter()), end=lambda: None)
            their_llm.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False,
                               pad_token_id=0, streamer=streamer, **cache)
            return (times[-1] - times[1]) / (new - 1)

        if not args.alone:
            their_llm, tried = their_llama(llm), []
            for cache in [{}, {"cache_implementation": "static", "disable_compile": not GPU}]:      # or dynamic
                theirs(9)
                tried.append((theirs(17), len(tried), cache))
            cache = min(tried)[2]                                                  # the one that is faster here
        llm.pack()
        times = alternate(ours, None if args.alone else theirs, args.repeats, clock=lambda side: side())
        matrices = [p for p in llm.layers.parameters() if p.ndim == 2] + [llm.head]
        vectors = {D: torch.randn(len(lengths), D, device=DEVICE, dtype=dtype) for D in {W.shape[1] for W in matrices}}
        ceiling_s, _ = alternate(lambda: [linear(vectors[W.shape[1]], W) for W in matrices] and None, None, 20)
        if GPU:
            numbers = torch.ones(2, 2 ** 28, device=DEVICE)             # a copy reads one half and writes the other
            copy_s, _ = alternate(lambda: numbers[1].copy_(numbers[0]), None, 5)
            ceiling_s = sum(W.nbytes for W in matrices) / numbers.nbytes * copy_s
        yield row(f"decode-{name}", *times, ceiling_s)


def train(args) -> Iterator[dict]:
    """A step (loss, gradients, clipping, AdamW) on 8 samples of a tile and 40 to 96 words; with --preset on 2 pages.

    The other side: transformers' towers, joined by the naive Align; rows padded on the right, where neither the loss
    nor a causal LLM needs a mask; logits of the text alone. Both have the heap that train.py sets.
    """
    keep_heap()
    dtype, rng, (B, T) = BF16 if GPU else FP32, random.Random(0), (2, 10) if args.preset else (8, 1)
    model = random_vlm(args, dtype)
    config, n = model.config, T * model.config.tile_tokens
    texts = [torch.randint(config.llm.vocab_size, (rng.randint(40, 96),)) for _ in range(B)]
    pixels = torch.randn(B * T, 3, config.vision.image_size, config.vision.image_size, device=DEVICE, dtype=dtype)
    samples = [torch.cat([torch.full((n,), IMAGE), text]) for text in texts]
    labels = [torch.cat([torch.full((n - 1,), IGNORE), text, torch.tensor([IGNORE])]) for text in texts]
    tokens, labels = torch.cat(samples)[None], torch.cat(labels)[None]             # (1, L), on the CPU as in train.py
    lengths, supervised = [len(s) for s in samples], sum(map(len, texts))

    def step(loss_of: Callable, modules: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    theirs = None
    if not args.alone:
        towers = nn.ModuleList([their_siglip(copy.deepcopy(model.vision)), copy.deepcopy(model.connector),
                                their_llama(copy.deepcopy(model.llm))])
        siglip, align, llama = towers
        words = pad_sequence(texts, batch_first=True).to(DEVICE)                   # (B, longest)
        targets = pad_sequence(texts, batch_first=True, padding_value=IGNORE).to(DEVICE)
        their_optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-5, fused=True)

        def their_loss() -> Tensor:
            E_text = llama.get_input_embeddings().weight
            F_align = align.p_vocab(siglip(pixels).last_hidden_state) @ E_text     # (B * T, n / T, D)
            x = torch.cat([F_align.view(B, n, -1), nnf.embedding(words, E_text)], dim=1)
            logits = llama(inputs_embeds=x, logits_to_keep=words.shape[1] + 1, use_cache=False).logits[:, :-1]
            return nnf.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        theirs = lambda: step(their_loss, towers, their_optimizer)
    if GPU:
        for block in [*model.vision.encoder["layers"], *model.llm.layers]:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    times = alternate(lambda: step(lambda: model(tokens, labels, pixels, lengths) / supervised, model, optimizer),
                      theirs, args.repeats)
    counts = Counter(tokens=sum(lengths), supervised=supervised, tiles=B * T, squares=sum(n ** 2 for n in lengths))
    yield row("train", *times, step_flops(config, ("vision", "connector", "llm"), counts) / product_rate(dtype))


def connector(args) -> Iterator[dict]:
    """Align forward and backward on one tile and on ten, against the naive equations under autograd (one tile only).

    extra_gb is beyond weights and gradients. of_ceiling counts the six products that autograd does.
    """
    config, dtype = ALIGNVLM_PRESETS[args.preset or "llama-3.2-1b"], BF16 if GPU else FP32
    d, D, V = config.vision.hidden_size, config.llm.hidden_size, config.llm.vocab_size
    align, E_text = Align(d, D, V).to(DEVICE, dtype), nn.Parameter(torch.randn(V, D, device=DEVICE, dtype=dtype))
    E_text.data *= D ** -0.5
    align.init_weights(E_text)
    weights = [*align.parameters(), E_text]

    def step(forward: Callable) -> None:
        for p in weights:
            p.grad = None
        forward(F, E_text).square().sum().backward()

    rate = product_rate(dtype)
    for n in (729, 7290):
        F = torch.randn(n, d, device=DEVICE, dtype=dtype)
        align.zero_grad()
        E_text.grad = None
        extra, first_s = extra_gb(lambda: step(align))
        extra = None if extra is None else extra - sum(p.grad.nbytes for p in weights) / 1e9
        naive = None if args.alone or n > 729 else lambda: step(lambda F, E_text: align.p_vocab(F) @ E_text)
        # Ten tiles take minutes on a CPU: there the first call is the only one.
        times = alternate(lambda: step(align), naive, args.repeats) if n == 729 or GPU else (first_s, None)
        yield row(f"connector-{n}", *times, 6 * 2 * n * D * V / rate, extra)


@torch.inference_mode()
def answer(args) -> Iterator[dict]:
    """A page and 16 words, 32 tokens of answer: with Align, and (theirs) with an MLP connector in its place."""
    dtype, T = BF16 if GPU else FP32, 10 if args.preset else 1
    model = random_vlm(args, dtype)
    v, align = model.config.vision, model.connector
    mlp = MLP(v.hidden_size, model.config.llm.hidden_size).to(DEVICE, dtype)
    tokens = torch.cat([torch.full((T * model.config.tile_tokens,), IMAGE), torch.arange(16)])
    pixels = torch.randn(T, 3, v.image_size, v.image_size)

    def generate(connector: nn.Module) -> None:
        model.connector = connector
        list(model.generate([tokens], [pixels], set(), 32))

    yield row("answer-align-vs-mlp", *alternate(lambda: generate(align), lambda: generate(mlp), args.repeats))


def load(args) -> Iterator[dict]:
    """A folder in hub format, in bf16, into a model that is in memory; the ceiling is a copy of as many bytes."""
    from transformers import LlamaForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        llm = our_llama(args, BF16)
        their_llama(llm).save_pretrained(folder)
        numbers = torch.ones(sum(p.numel() for p in llm.parameters()), dtype=BF16)

        def loaded(model: nn.Module) -> None:
            for p in model.parameters():        # a mapped file is not in memory before every page of it was read
                p.flatten()[::2048].max()

        times = alternate(lambda: loaded(Llama.from_pretrained(folder, device=DEVICE)),
                          lambda: loaded(LlamaForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE)),
                          args.repeats)
        yield row("load", *times, alternate(lambda: numbers.clone(), None, 5)[0])


# Each with how often it is repeated. The last one changes how memory is allocated.
WORKS = {"pages": (pages, 20), "vision": (vision, 3), "prefill": (prefill, 5), "decode": (decode, 3),
         "connector": (connector, 3), "load": (load, 5), "answer": (answer, 5), "train": (train, 5)}


def table_line(cells) -> str:
    name, *numbers = ("-" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells)
    return f"{name:>26}" + "".join(f"{number:>13}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("work", nargs="*", help=f"which of {', '.join(WORKS)} (default: all)")
    add("--preset", choices=ALIGNVLM_PRESETS, help="sizes (default: SigLIP so400m for vision, SmolLM2-135M for "
        "prefill, decode and load, SigLIP base with it for answer and train, Llama-3.2-1B for connector)")
    add("--llm", help="folder with a released Llama for prefill, decode and load (default: random weights)")
    add("--alone", action="store_true", help="ours alone (vision, prefill, decode, connector, train)")
    add("--repeats", type=int, help="calls of each side (default: 3 to 20, as long as they take)")
    add("--threads", type=int, help="CPU threads (default: all cores; pages always takes one)")
    add("--json", action="store_true", help="a JSON line per row instead of a table")
    args = parser.parse_args()
    if unknown := set(args.work) - set(WORKS):
        parser.error(f"no work called {', '.join(unknown)}: there is {', '.join(WORKS)}")
    if any(n is not None and n < 1 for n in (args.repeats, args.threads)):
        parser.error("--repeats and --threads are at least 1")
    threads = args.threads or torch.get_num_threads()
    torch.manual_seed(0)
    for name in [name for name in WORKS if name in (args.work or WORKS)]:      # in their order: train keeps its heap
        work, repeats = WORKS[name]
        torch.set_num_threads(1 if name == "pages" else threads)
        try:
            for i, row in enumerate(work(argparse.Namespace(**{**vars(args), "repeats": args.repeats or repeats}))):
                if not args.json and i == 0:
                    print(table_line(row))
                print(json.dumps(row) if args.json else table_line(row.values()), flush=True)
        except ImportError as error:
            parser.error(f"{name} needs `pip install transformers` ({error})")


if __name__ == "__main__":
    run_main(main)
