"""What training costs: FLOPs of a step, memory of each GPU, days; what train.py --plan says, and its log's mfu."""
import copy
import math
import sys
from collections import Counter
from dataclasses import replace

import torch

from connector import BLOCK_BYTES, CACHE_BYTES
from model import ALIGNVLM_PRESETS, LOGITS, AlignVLM, AlignVLMConfig, read_llama
from plumbing.settings import InputError
from vision import read_siglip

PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
         "L40S": 362e12}        # dense bf16 FLOP/s
# What a sample of a stage is taken to hold, and how many the paper has: (samples, tiles, text tokens, supervised ones).
# Captions come with one tile, pages with as many as --max-tiles allows and the whole page.
SAMPLES = {1: (8_100_000, 1, 64, 32), 2: (7_500_000, None, 768, 640), 3: (570_000, None, 128, 32)}
SMALL_SAMPLES = {1: (558_000, 1, 64, 32), 2: (779_000, 5, 384, 256)}        # low-resource


def step_flops(config: AlignVLMConfig, trainable: tuple[str, ...], counts: Counter) -> float:
    """Floating-point operations of a training step by the model's formula, recomputation not counted.

    counts: train.match_ranks's. A token's product with a matrix of n numbers is 2 n; backward as much again for the
    weights' gradient, if they train, and for the input's, if anything before does.
    """
    v, l, c = config.vision, config.llm, config.connector
    d, D, V, q, N = v.hidden_size, l.hidden_size, l.vocab_size, l.n_heads * l.head_dim, v.n_patches
    vision_layer = 4 * d ** 2 + 2 * d * v.intermediate_size + 2 * N * d
    llm_layer = 2 * D * (q + l.n_kv_heads * l.head_dim) + 3 * D * l.intermediate_size
    tiles, asking, seen, K = counts["tiles"], c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.table_size
    resampler = (c.n_latents * (2 * D * asking + 12 * D ** 2)
                 + (N + c.n_latents) * (2 * D * seen + 2 * c.n_latents * asking))
    # A tile's products with F itself, whose gradient only the vision encoder needs, and what follows.
    first, then = {"align": (N * d * D, N * D * V), "mlp": (N * d * D, N * D ** 2), "ovis": (N * d * K, N * K * D),
                   "perceiver": (8 * N * d * D, 4 * N * D ** 2 + c.depth * resampler)}[c.kind]
    products = [        # in their order; attention is causal, half of 2 q L^2
        ("vision", tiles * N * 3 * v.patch_size ** 2 * d), ("vision", tiles * N * v.n_layers * vision_layer),
        ("connector", tiles * first), ("connector", tiles * then), ("llm", tiles * N * D * V * (c.kind == "align")),
        ("llm", counts["supervised"] * D * V + l.n_layers * (counts["tokens"] * llm_layer + counts["squares"] * q))]
    flops, any_before = 0, False
    for name, n in products:
        flops += 2 * n * (1 + (name in trainable) + any_before)
        any_before = any_before or name in trainable
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
    v, l, c = config.vision, config.llm, config.connector
    D, q, kv, visual = l.hidden_size, l.n_heads * l.head_dim, l.n_kv_heads * l.head_dim, tiles * v.n_patches
    vision_block, llm_block = (sum(p.numel() for p in layers[0].parameters())
                               for layers in (model.vision.encoder["layers"], model.llm.layers))
    root, training = n["llm"] - l.n_layers * llm_block, sum(n[name] for name in trainable)
    # A unit is whole while it runs, and the next one is fetched; its gradient is whole until it is summed in fp32. The
    # root (word embedding, head) stays whole, and so does its gradient. One process alone computes on its own weights.
    whole = [size * root, 2 * size * max(vision_block, llm_block, n["connector"]),
             (size + 4) * (root * ("llm" in trainable) + max(vision_block, llm_block, n["connector"]))]
    llm_keeps = tokens * (2 * max(4, size) * D + size * (4 * D + 3 * q + 2 * kv + 4 * l.intermediate_size))
    vision_keeps = visual * size * (8 * v.hidden_size + 2 * v.intermediate_size) * ("vision" in trainable)
    activations = l.n_layers * llm_keeps + v.n_layers * vision_keeps
    if recompute:
        activations = (l.n_layers * tokens * size * D + max(llm_keeps, vision_keeps)
                       + v.n_layers * visual * size * v.hidden_size * ("vision" in trainable))
    wide = {"align": l.vocab_size, "ovis": c.table_size}.get(c.kind, 0)        # a row of what Mixture makes
    connector_keeps = visual * D * {"align": 3, "mlp": 3, "ovis": 1, "perceiver": 17 + 2 * c.depth}[c.kind]
    if c.kind == "perceiver":       # keys and values of the features, and all that is done with the latents
        connector_keeps += 2 * c.depth * (visual * c.n_kv_heads * c.head_dim + tiles * c.n_latents * (
            12 * D + c.head_dim * (c.n_heads + c.n_kv_heads)))
    return {
        "parameters": 4 * sum(n.values()) / ranks,
        "gradients": 4 * training / ranks,
        "optimizer": 8 * training / ranks,
        "gathered": sum(whole) if ranks > 1 or size == 2 else 0,
        "activations": activations,
        # What it keeps; connector.Mixture's blocks of two (n, V), and one or two fp32 copies of a few rows.
        "connector": (size * connector_keeps + min(BLOCK_BYTES, 2 * size * 16 * math.ceil(visual / 16) * wide)
                      + 1.5 * min(CACHE_BYTES if size > 2 else BLOCK_BYTES // 4, 4 * visual * wide)),
        "head": min(supervised * l.vocab_size, LOGITS) * (size + 8),        # logits, in fp32, and their gradient
        "data": tiles * 3 * v.image_size ** 2 * 4,
    }


def plan(args, recipes: dict) -> None:
    """Print what stages take on --gpus, by their recipes: memory per GPU, FLOPs and time of a step, days."""
    config = copy.copy(ALIGNVLM_PRESETS.get(args.preset, ALIGNVLM_PRESETS["llama-3.2-1b"]))
    if args.llm:
        config = AlignVLMConfig(read_siglip(args.vision)[0], read_llama(args.llm)[0])
    config.connector = replace(config.connector, **args.connector_settings)
    ranks = min(args.shard_size or args.gpus, args.gpus)
    if args.gpus % ranks:
        raise InputError(f"--shard-size {ranks} does not divide --gpus {args.gpus}")
    for stage, recipe in recipes.items():
        samples, tiles, text, answer = (SMALL_SAMPLES if args.preset == "low-resource" else SAMPLES)[stage]
        tiles = tiles or (1 if args.max_tiles == 1 else args.max_tiles + 1)
        length = tiles * config.tile_tokens + text
        batch, row_tokens = recipe.batch_size, recipe.row_tokens
        print(f"\nstage {stage} of {args.preset} on {args.gpus} GPUs, one copy on {ranks} of them: "
              f"{' + '.join(recipe.trainable)} trained, {batch} samples a step, each of {tiles} tiles and {text} "
              f"tokens of text ({length:,} tokens)")
        for options, recompute, most in [("as asked", args.recompute, row_tokens), ("--recompute", True, row_tokens),
                                         (f"--recompute --row-tokens {length}", True, length)]:
            in_row = max(1, min(math.ceil(batch / args.gpus), most // length))      # a GPU's share of a step, at most
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
        steps = recipe.steps or math.ceil(samples * recipe.epochs / batch)
        hours = steps * seconds / 3600
        print(f"  {flops:.3g} FLOPs a step, {seconds:.3g} s at {args.mfu:.0%} of an H100's peak (a third more with "
              f"--recompute); {steps:,} steps in " + (f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.2g} hours"))
