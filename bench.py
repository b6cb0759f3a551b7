"""What it costs: speed, measured beside transformers in one run, and what training takes, on paper and by its log.

    pip install transformers
    python bench.py                     # all of it
    python bench.py pages --json        # one, a JSON line per row

The two sides take turns, and the median over the repeats counts: absolute times on a shared CPU mean little, ratios do.
The second half is what train.py --plan and --plot run, and the arithmetic of its log.
"""
import argparse
import io
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from connector import BLOCK_BYTES, CACHE_BYTES
from model import ALIGNVLM_PRESETS, LOGITS, AlignVLM, AlignVLMConfig, read_llama
from vision import SIGLIP_PRESETS, InputError, read_image, read_siglip, tile, tile_boxes


def alternate(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float]:
    """The median seconds of either, called in turns; a first call of each is not counted."""
    times = {ours: [], theirs: []}
    for repeat in range(repeats + 1):
        for work in times:
            start = time.perf_counter()
            work()
            times[work].append(time.perf_counter() - start)
    return statistics.median(times[ours][1:]), statistics.median(times[theirs][1:])


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


def pages(repeats: int) -> list[dict]:
    """Decoding, tiling and normalising a page on one core, against SiglipImageProcessorPil on the same boxes."""
    from transformers import SiglipImageProcessorPil
    config, processor, rows = SIGLIP_PRESETS["so400m-patch14-384"], SiglipImageProcessorPil(), []
    side = config.image_size

    def theirs(data: bytes) -> torch.Tensor:
        page = Image.open(io.BytesIO(data)).convert("RGB")
        boxes = tile_boxes(*page.size, config)
        pixels = np.zeros((len(boxes), 3, side, side), dtype=np.float32)
        for canvas, (left, top, right, bottom) in zip(pixels, boxes):
            w, h = right - left, bottom - top
            new_w, new_h = (side, max(1, int(h / w * side))) if w >= h else (max(1, int(w / h * side)), side)
            done = processor(page.crop((left, top, right, bottom)), size={"height": new_h, "width": new_w},
                             return_tensors="np")["pixel_values"][0]
            y, x = (side - new_h) // 2, (side - new_w) // 2
            canvas[:, y:y + new_h, x:x + new_w] = done
        return torch.from_numpy(pixels)

    for width, height, kind in [(850, 1100, "PNG"), (1700, 2200, "PNG"), (1700, 2200, "JPEG"), (500, 400, "JPEG")]:
        data = page_file(width, height, kind)
        difference = (tile(read_image(io.BytesIO(data)), config) - theirs(data)).abs().max().item()
        ours_s, theirs_s = alternate(lambda: tile(read_image(io.BytesIO(data)), config), lambda: theirs(data), repeats)
        rows.append({"work": f"pages-{width}x{height}-{kind.lower()}", "ours_s": ours_s, "theirs_s": theirs_s,
                     "ratio": ours_s / theirs_s, "pages_per_s": 1 / ours_s, "difference": difference})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What training costs

PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}   # dense bf16 FLOP/s
# What a sample of a stage is taken to hold, and how many the paper has: (samples, tiles, text tokens, supervised ones).
# Captions come with one tile, pages with as many as --max-tiles allows and the whole page.
SAMPLES = {1: (8_100_000, 1, 64, 32), 2: (7_500_000, None, 768, 640), 3: (570_000, None, 128, 32)}
SMALL_SAMPLES = {1: (558_000, 1, 64, 32), 2: (779_000, 5, 384, 256)}        # low-resource


def step_flops(config: AlignVLMConfig, trainable: tuple[str, ...], counts: Counter) -> float:
    """Floating-point operations of a training step by the model's formula, recomputation not counted.

    counts: tokens, supervised, tiles and squares (the sum of the samples' squared lengths), as train.in_step has them.
    A token's product with a matrix of n numbers is 2 n; backward as much again for the weights' gradient, if they
    train, and for the input's, if anything trains up to here.
    """
    v, l = config.vision, config.llm
    D, V, q, visual = l.hidden_size, l.vocab_size, l.n_heads * l.head_dim, counts["tiles"] * v.n_patches
    vision_layer = 4 * v.hidden_size ** 2 + 2 * v.hidden_size * v.intermediate_size + 2 * v.n_patches * v.hidden_size
    llm_layer = 2 * D * (q + l.n_kv_heads * l.head_dim) + 3 * D * l.intermediate_size
    forward = {
        "vision": 2 * visual * (v.n_layers * vision_layer + 3 * v.patch_size ** 2 * v.hidden_size),
        "connector": 2 * visual * (v.hidden_size * D + D * V),
        # The product with E_text, and the head; attention is causal, half of 2 q L^2.
        "llm": 2 * (visual + counts["supervised"]) * D * V
        + 2 * l.n_layers * (counts["tokens"] * llm_layer + counts["squares"] * q),
    }
    flops, any_before = 0, False
    for name, n in forward.items():
        any_before = any_before or name in trainable
        flops += n * (1 + (name in trainable) + any_before)
    return flops


def mfu(flops_per_s: float, device: torch.device) -> float | str:
    """Model FLOP/s of one device as a share of its peak; "unknown" where that is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops_per_s / peak for key, peak in PEAKS.items() if key in name), "unknown")


def peak_memory(device: torch.device) -> int | str:
    """The most bytes that this process has had: of the device, or of a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return "unknown"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(config: AlignVLMConfig, trainable: tuple[str, ...], ranks: int, tokens: int, tiles: int, supervised: int,
           recompute: bool = False, size: int = 2) -> dict[str, float]:
    """Bytes of each part on one of `ranks` GPUs that hold a model between them, for the longest row of a step.

    tokens, tiles, supervised: what the row holds. size: bytes of a number in the computation: 2 in bf16 (CUDA), 4 in
    fp32 (CPU). Activations are counted along the blocks' code: the vectors that autograd keeps between two operations.
    """
    with torch.device("meta"):
        model = AlignVLM(config)
    n = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    v, l = config.vision, config.llm
    D, q, kv, visual = l.hidden_size, l.n_heads * l.head_dim, l.n_kv_heads * l.head_dim, tiles * v.n_patches
    vision_block, llm_block = (sum(p.numel() for p in layers[0].parameters())
                               for layers in (model.vision.encoder["layers"], model.llm.layers))
    sixteens = 16 * math.ceil(visual / 16)
    root, training = n["llm"] - l.n_layers * llm_block, sum(n[name] for name in trainable)
    # A unit is whole while it runs, and the next one is fetched; its gradient is whole until it is summed in fp32. The
    # root (word embedding, head) stays whole, and so does its gradient. One process alone computes on its own weights.
    whole = [size * root, 2 * size * max(vision_block, llm_block, n["connector"]),
             (size + 4) * (root * ("llm" in trainable) + max(vision_block, llm_block, n["connector"]))]
    llm_keeps = tokens * (2 * max(4, size) * D + size * (4 * D + 3 * q + 2 * kv + 4 * l.intermediate_size))
    vision_keeps = visual * size * (8 * v.hidden_size + 2 * v.intermediate_size) * ("vision" in trainable)
    if recompute:
        activations = (l.n_layers * tokens * size * D + max(llm_keeps, vision_keeps)
                       + v.n_layers * visual * size * v.hidden_size * ("vision" in trainable))
    else:
        activations = l.n_layers * llm_keeps + v.n_layers * vision_keeps
    return {
        "parameters": 4 * sum(n.values()) / ranks,
        "gradients": 4 * training / ranks,
        "optimizer": 8 * training / ranks,
        "gathered": sum(whole) if ranks > 1 or size == 2 else 0,
        "activations": activations,
        # connector.Mixture: what it keeps, its blocks of two (n, V), and two or three fp32 copies of a few rows.
        "connector": (visual * (3 * size * D + 20) + min(BLOCK_BYTES, 2 * size * sixteens * l.vocab_size)
                      + 2.5 * min(CACHE_BYTES, 4 * visual * l.vocab_size)),
        "head": min(supervised * l.vocab_size, LOGITS) * (size + 8),        # logits, in fp32, and their gradient
        "data": tiles * 3 * v.image_size ** 2 * 4,
    }


def plan(args, recipes: dict) -> None:
    """Print what --stage (or each) of a preset takes on --gpus: memory per GPU, FLOPs and time of a step, days."""
    preset = args.preset if args.preset in ALIGNVLM_PRESETS else "llama-3.2-1b"
    config = ALIGNVLM_PRESETS[preset]
    if args.llm:
        config = AlignVLMConfig(read_siglip(args.vision)[0], read_llama(args.llm)[0])
    v, ranks = config.vision, min(args.shard_size or args.gpus, args.gpus)
    for stage in [args.stage] if args.stage is not None else [stage for stage in recipes[args.preset] if stage > 0]:
        recipe = recipes[args.preset][stage]
        samples, tiles, text, answer = (SMALL_SAMPLES if args.preset == "low-resource" else SAMPLES)[stage]
        tiles = tiles or (1 if args.max_tiles == 1 else args.max_tiles + 1)
        length = tiles * v.n_patches + text
        batch, row_tokens = args.batch_size or recipe.batch_size, args.row_tokens or recipe.row_tokens
        share = math.ceil(batch / args.gpus)            # samples of a GPU in a step
        print(f"\nstage {stage} of {args.preset} on {args.gpus} GPUs, one copy on {ranks} of them: "
              f"{' + '.join(recipe.trainable)} trained, {batch} samples a step, each of {tiles} tiles and {text} "
              f"tokens of text ({length:,} tokens)")
        for options, recompute, most in [("as asked", args.recompute, row_tokens), ("--recompute", True, row_tokens),
                                         (f"--recompute --row-tokens {length}", True, length)]:
            in_row = max(1, min(share, most // length))
            parts = memory(config, recipe.trainable, ranks, in_row * length, in_row * tiles, in_row * answer, recompute)
            total = sum(parts.values()) / 1e9
            fits = total <= 0.9 * args.gpu_memory       # the rest is for CUDA, NCCL and fragments
            print(f"  {options}: {total:.3g} GB a GPU, " + ("which fits" if fits else
                  f"more than 90 % of {args.gpu_memory:g}") + "\n    "
                  + ", ".join(f"{name} {n / 1e9:.3g}" for name, n in parts.items()))
            if fits:
                break
        else:
            print("  nothing fits: more GPUs" + ("" if ranks == args.gpus else f", or --shard-size {args.gpus}"))
        flops = step_flops(config, recipe.trainable, Counter(
            tokens=batch * length, supervised=batch * answer, tiles=batch * tiles, squares=batch * length ** 2))
        seconds = flops / (args.gpus * args.mfu * PEAKS["H100"])
        steps = args.steps or recipe.steps or math.ceil(samples * recipe.epochs / batch)
        hours = steps * seconds / 3600
        print(f"  {flops:.3g} FLOPs a step, {seconds:.3g} s at {args.mfu:.0%} of an H100's peak (a third more with "
              f"--recompute); {steps:,} steps in " + (f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.2g} hours"))


# ---------------------------------------------------------------------------------------------------------------------
# What a log says


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl in the order of their steps; of steps that were done twice the last counts."""
    rows: dict = {}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "resumed" in row:
                rows = {key: old for key, old in rows.items() if key[0] < row["resumed"]}
            else:
                rows[row["step"], "held_out_loss" in row] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a log.jsonl ({error})") from None
    return list(rows.values())


def plot(paths: list[Path], out: Path) -> None:
    """Draw loss (held-out ones dashed) and throughput of log.jsonl files, or of those in runs' folders, into a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs `pip install matplotlib`") from None
    logs = [log for path in paths for log in (sorted(path.glob("**/log.jsonl")) if path.is_dir() else [path])]
    if not logs:
        raise InputError(f"--plot {' '.join(map(str, paths))}: no log.jsonl there")
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1)
    for log in logs:
        rows = read_log(log)
        steps = [row for row in rows if "loss" in row]
        [line] = loss.plot([r["step"] for r in steps], [math.nan if r["loss"] is None else r["loss"] for r in steps],
                           linewidth=0.8, label=str(log.parent))
        held_out = [row for row in rows if "held_out_loss" in row]
        loss.plot([r["step"] for r in held_out], [r["held_out_loss"] for r in held_out], "o--", color=line.get_color())
        speed.plot([r["step"] for r in steps], [r["tokens_per_s"] for r in steps], linewidth=0.8)
    loss.set(ylabel="loss, nats a token (dashed: held out)", yscale="log")
    speed.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    loss.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"{len(logs)} logs drawn in {out}")


# ---------------------------------------------------------------------------------------------------------------------


WORKS = {"pages": pages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", help=f"which of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON line per row instead of a table")
    args = parser.parse_args()
    if unknown := set(args.work) - set(WORKS):
        parser.error(f"no work called {', '.join(unknown)}: there is {', '.join(WORKS)}")
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads are at least 1")
    torch.set_num_threads(args.threads)
    for name in args.work or WORKS:
        try:
            rows = WORKS[name](args.repeats)
        except ImportError as error:
            parser.error(f"{name} needs `pip install transformers` ({error})")
        for i, row in enumerate(rows):
            if args.json:
                print(json.dumps(row))
                continue
            if i == 0:
                print("".join(f"{key:>{26 if key == 'work' else 13}}" for key in row))
            print("".join(f"{value:>26}" if key == "work" else f"{value:13.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
