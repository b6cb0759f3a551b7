"""What training takes before one has paid for it: memory of each GPU, FLOPs and time of a step,
days.

    python -m paper.plan --preset llama-3.2-1b --stage 2 --gpus 8 --gpu-memory 24
    python -m paper.plan --vision google/siglip-base-patch16-224 \\
        --llm HuggingFaceTB/SmolLM2-135M --gpus 1

The recipes are train.py's (paper/recipes.py), and so are the flags that change them. Memory is that
of the longest row of a step; train.py logs what a step really takes.
"""
import argparse
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from connector import BLOCK_BYTES, CACHE_BYTES, CONNECTORS, GPU_BLOCK_BYTES, GPU_CHUNK_BYTES
from model import ALIGNVLM_PRESETS, LOGITS, AlignVLM, AlignVLMConfig, LlamaConfig, read_llama
from paper.recipes import RECIPES, Recipe, lr_share, preset_for, recipe_for
from plumbing.hub import hub_folder
from plumbing.logs import PEAKS
from plumbing.processes import run_main
from plumbing.released import llama_sizes, siglip_sizes
from plumbing.settings import SEVERAL, InputError, positive, tile_limit
from vision import SigLIPConfig


@dataclass
class StageData:
    """What a stage is taken to learn from."""
    samples: int
    tiles: int | None           # of a sample; None: as many as --max-tiles allows
    text: int                   # tokens of a sample that are no visual ones
    supervised: int             # of these, those to be learnt


# The paper gives the samples of stages 1 and 2 (section 3.3); the other numbers are assumed.
# Captions come with one tile, documents with as many as they may have.
PAPER_DATA = {1: StageData(8_100_000, 1, 64, 32),
              2: StageData(7_500_000, None, 768, 640),
              3: StageData(570_000, None, 128, 32)}
LOW_RESOURCE_DATA = {1: StageData(558_000, 1, 64, 32), 2: StageData(779_000, 5, 384, 256)}


# --------------------------------------------------------------------------------------------------
# FLOPs


def step_flops(config: AlignVLMConfig, trainable: tuple[str, ...], counts: Counter) -> float:
    """Floating-point operations of a training step by the model's formula, recomputation not
    counted.

    counts: train.match_ranks's. A token's product with a matrix of n numbers is 2 n; backward as
    much again for the weights' gradient, if they train, and for the input's, if anything before
    does. Of a frozen LLM's attention half of the backward pass is left out.
    """
    flops, any_before = 0, False
    for module, multiplications in products(config, counts):
        flops += 2 * multiplications * (1 + (module in trainable) + any_before)
        any_before = any_before or module in trainable
    return flops


def products(config: AlignVLMConfig, counts: Counter) -> list[tuple[str, float]]:
    """The multiplications of a step's forward pass, (module whose weights they are with, how many),
    in the order of the pass."""
    v, l = config.vision, config.llm
    d, D, V, N = v.hidden_size, l.hidden_size, l.vocab_size, v.n_patches
    T = counts["tiles"]
    vision_layer = 4 * d ** 2 + 2 * d * v.intermediate_size + 2 * N * d    # of a patch
    q, kv = l.n_heads * l.head_dim, l.n_kv_heads * l.head_dim
    llm_layer = 2 * D * (q + kv) + 3 * D * l.intermediate_size     # of a token, without attention
    attention = counts["squares"] * q       # causal: half of 2 q L^2
    with_F, then = connector_products(config)
    mixes_E_text = config.connector.kind == "align"
    return [("vision", T * N * 3 * v.patch_size ** 2 * d),
            ("vision", T * N * v.n_layers * vision_layer),
            ("connector", T * with_F),
            ("connector", T * then),
            ("llm", T * N * D * V * mixes_E_text),      # equation 2: F' = P_vocab E_text
            ("llm", counts["supervised"] * D * V
                    + l.n_layers * (counts["tokens"] * llm_layer + attention))]


def connector_products(config: AlignVLMConfig) -> tuple[float, float]:
    """A tile's multiplications in the connector: those with F itself, whose gradient only the
    vision encoder needs, and those that follow."""
    v, l, c = config.vision, config.llm, config.connector
    d, D, V, N = v.hidden_size, l.hidden_size, l.vocab_size, v.n_patches
    match c.kind:
        case "align":
            return N * d * D, N * D * V
        case "mlp":
            return N * d * D, N * D ** 2
        case "ovis":
            return N * d * c.table_size, N * c.table_size * D
        case "perceiver":
            q, kv, n = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_latents
            layer = n * (2 * D * q + 12 * D ** 2) + (N + n) * (2 * D * kv + 2 * n * q)
            return 8 * N * d * D, 4 * N * D ** 2 + c.depth * layer


# --------------------------------------------------------------------------------------------------
# Memory


def memory(config: AlignVLMConfig, trainable: tuple[str, ...], ranks: int, tokens: int, tiles: int,
           supervised: int, recompute: bool = False, size: int = 2,
           offload: bool = False) -> dict[str, float]:
    """Bytes of each part on one of `ranks` GPUs that hold a model between them, for the longest row
    of a step.

    tokens, tiles, supervised: what the row holds. size: bytes of a number in the computation: 2 in
    bf16 (CUDA), 4 in fp32 (CPU). offload: what the optimizer works on is in the CPU's memory.
    """
    with torch.device("meta"):
        model = AlignVLM(config)
    n = {name: n_parameters(module) for name, module in model.named_children()}
    training = sum(n[name] for name in trainable)
    logits = min(supervised * config.llm.vocab_size, LOGITS)        # that are there at a time
    on_gpu = not offload
    return {
        "parameters": 4 * sum(n.values()) / ranks * on_gpu,
        "gradients": 4 * training / ranks * on_gpu,
        "optimizer": 8 * training / ranks * on_gpu,
        # One process alone, in fp32, computes on its own weights.
        "gathered": gathered_bytes(model, trainable, size, offload) if ranks > 1 or size == 2
                    else 0,
        "activations": activation_bytes(config, trainable, tokens, tiles, recompute, size),
        "connector": connector_bytes(config, tiles, size),
        "head": logits * (size + 8),        # they, in fp32, and their gradient
        "data": tiles * 3 * config.vision.image_size ** 2 * 4,      # pixels in fp32
    }


def cpu_memory(config: AlignVLMConfig, trainable: tuple[str, ...], ranks: int,
               offload: bool) -> float:
    """Bytes of the CPU's memory that a process takes besides PyTorch and the data: a copy of the
    training state while it is written, weights and moments. With --offload also what the optimizer
    works on: moments, and weights and gradients in pinned memory, which PyTorch hands out in powers
    of two."""
    with torch.device("meta"):
        model = AlignVLM(config)
    total = 0
    for name, p in model.named_parameters():
        is_trained = name.split(".")[0] in trainable
        size = 4 * math.ceil(p.numel() / ranks)
        moments = 2 * size * is_trained
        total += size + moments
        if offload:
            pinned = 2 ** math.ceil(math.log2(size))
            total += pinned + pinned * is_trained + moments
    return total


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gathered_bytes(model: AlignVLM, trainable: tuple[str, ...], size: int,
                   offload: bool) -> float:
    """What FSDP keeps whole. A unit is whole while it runs, and the next one is fetched; its
    gradient is whole until it is summed in fp32. The root (token embedding, head) stays whole, and
    so does its gradient. Offloaded, the next unit comes in fp32."""
    vision_block, llm_block = model.vision.encoder["layers"][0], model.llm.layers[0]
    unit = max(n_parameters(module) for module in (vision_block, llm_block, model.connector))
    root = n_parameters(model.llm) - len(model.llm.layers) * n_parameters(llm_block)
    weights = size * root + 2 * size * unit + 4 * unit * offload
    gradients = (size + 4) * (root * ("llm" in trainable) + unit)
    return weights + gradients


def activation_bytes(config: AlignVLMConfig, trainable: tuple[str, ...], tokens: int, tiles: int,
                     recompute: bool, size: int) -> float:
    """Counted along the blocks' code: the vectors that autograd keeps between two operations."""
    v, l = config.vision, config.llm
    d, D, visual = v.hidden_size, l.hidden_size, tiles * v.n_patches
    q, kv = l.n_heads * l.head_dim, l.n_kv_heads * l.head_dim
    learns_to_see = "vision" in trainable
    of_a_token = 4 * D + 3 * q + 2 * kv + 4 * l.intermediate_size
    llm_block = tokens * (2 * max(4, size) * D + size * of_a_token)
    vision_block = visual * size * (8 * d + 2 * v.intermediate_size) * learns_to_see
    if not recompute:
        return l.n_layers * llm_block + v.n_layers * vision_block
    inputs = l.n_layers * tokens * size * D + v.n_layers * visual * size * d * learns_to_see
    return inputs + max(llm_block, vision_block)


def connector_bytes(config: AlignVLMConfig, tiles: int, size: int) -> float:
    """What autograd keeps of the connector, and what connector.Mixture's backward pass holds: two
    (R, V) matrices, and a few of their rows in fp32, one and a half times, or four times where the
    matrices are in bf16."""
    l, c = config.llm, config.connector
    D, visual = l.hidden_size, tiles * config.vision.n_patches
    keeps = visual * D * {"align": 3, "mlp": 3, "ovis": 1, "perceiver": 17 + 2 * c.depth}[c.kind]
    if c.kind == "perceiver":       # the features' keys and values, and all that the latents do
        latent = 12 * D + c.head_dim * (c.n_heads + c.n_kv_heads)
        keeps += 2 * c.depth * (visual * c.n_kv_heads * c.head_dim + tiles * c.n_latents * latent)
    wide = {"align": l.vocab_size, "ovis": c.table_size}.get(c.kind, 0)    # a row of Mixture's
    most_block, most_rows, copies = BLOCK_BYTES, CACHE_BYTES, 1.5
    if size == 2:
        most_block, most_rows, copies = GPU_BLOCK_BYTES, GPU_CHUNK_BYTES, 4
    block = min(most_block, 2 * size * 16 * math.ceil(visual / 16) * wide)
    return size * keeps + block + copies * min(most_rows, 4 * visual * wide)


# --------------------------------------------------------------------------------------------------
# The command


def print_stage(stage: int, recipe: Recipe, config: AlignVLMConfig,
                args: argparse.Namespace) -> None:
    """What a stage takes on --gpus: memory per GPU, FLOPs and time of a step, days."""
    data = (LOW_RESOURCE_DATA if args.preset == "low-resource" else PAPER_DATA)[stage]
    most_tiles = 1 if args.max_tiles == 1 else args.max_tiles + 1       # with the whole page
    tiles = min(data.tiles or most_tiles, most_tiles)
    length = tiles * config.tile_tokens + data.text
    print(f"\nstage {stage} of {args.preset} on {args.gpus} GPUs, one copy on {args.shard_size} of "
          f"them: {' + '.join(recipe.trainable)} trained, {recipe.batch_size} samples a step, each "
          f"of {tiles} tiles and {data.text} tokens of text ({length:,} tokens)")
    print_memory(recipe, config, data, tiles, args)
    samples = recipe.batch_size
    counts = Counter(tokens=samples * length, supervised=samples * data.supervised,
                     tiles=samples * tiles, squares=samples * length ** 2)
    flops = step_flops(config, recipe.trainable, counts)
    seconds = flops / (args.gpus * args.mfu * PEAKS["H100"])
    steps = recipe.steps or math.ceil(data.samples * recipe.epochs / samples)
    hours = steps * seconds / 3600
    time = f"{hours / 24:.1f} days" if hours > 48 else f"{hours:.2g} hours"
    print(f"  {flops:.3g} FLOPs a step, {seconds:.3g} s at {args.mfu:.0%} of an H100's peak (a "
          f"third more with --recompute); {steps:,} steps in {time}")


def print_memory(recipe: Recipe, config: AlignVLMConfig, data: StageData, tiles: int,
                 args: argparse.Namespace) -> None:
    """Bytes a GPU with train.py's flags that save more and more of them, up to the first that
    fits."""
    length = tiles * config.tile_tokens + data.text
    if args.row_tokens and args.row_tokens <= tiles * config.tile_tokens:
        raise InputError(f"--row-tokens {args.row_tokens}: a page of {tiles} tiles alone has "
                         f"{tiles * config.tile_tokens:,}")
    # A smaller row would cut the stage's longest texts.
    longest = tiles * config.tile_tokens + recipe.max_length
    a_share = math.ceil(recipe.batch_size / args.gpus)          # of a step's samples
    a_page = f"--row-tokens {longest}"
    for flags, row_tokens in [("as asked", recipe.row_tokens),
                              ("--recompute", recipe.row_tokens),
                              (f"--recompute {a_page}", longest),
                              (f"--recompute {a_page} --offload", longest)]:
        recompute, offload = "--recompute" in flags, "--offload" in flags
        in_row = max(1, min(a_share, row_tokens // length))     # samples
        tokens, supervised = in_row * length, in_row * data.supervised
        if a_page in flags:
            tokens, supervised = longest, recipe.max_length
        parts = memory(config, recipe.trainable, args.shard_size, tokens, in_row * tiles,
                       supervised, recompute, offload=offload)
        total = sum(parts.values()) / 1e9
        fits = total <= 0.9 * args.gpu_memory       # the rest is for CUDA, NCCL and fragments
        verdict = f"more than 90 % of {args.gpu_memory:g}"
        if fits:
            on_cpu = cpu_memory(config, recipe.trainable, args.shard_size, offload) / 1e9
            when = "" if offload else " while a state is written"
            verdict = f"which fits, and {on_cpu:.3g} GB of the CPU's memory for each{when}"
        print(f"  {flags}: {total:.3g} GB a GPU, {verdict}")
        print("    " + ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items()))
        if fits:
            return
    more = "" if args.shard_size == args.gpus else f", or --shard-size {args.gpus}"
    print(f"  nothing fits: more GPUs{more}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paper.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # The toy and the reader learn from drawn pages, whose sizes a plan does not know.
    add("--preset", choices=[name for name in RECIPES if name not in ("toy", "reader")],
        help="recipe (default: by the size of --llm; without one llama-3.2-1b)")
    add("--stage", type=int, choices=[1, 2, 3], help="this stage only (default: all)")
    add("--gpus", type=positive(int, most=10 ** 6), default=64,
        help="how many (default: %(default)s)")
    add("--gpu-memory", type=positive(float), default=80, help="GB of each (default: %(default)s)")
    add("--mfu", type=positive(float, most=1), default=0.4,
        help="share of an H100's 989 TFLOP/s that is reached (default: %(default)s)")
    add("--vision", help="folder with a released SigLIP, or its name on the hub, `owner/name`, of "
        "which only config.json is fetched (default: the preset's sizes)")
    add("--llm", help="the same of a released Llama (default: the preset's sizes)")
    same = parser.add_argument_group("as in train.py").add_argument
    same("--connector", choices=CONNECTORS, default="align", help="(default: %(default)s)")
    same("--batch-size", type=positive(int),
         help="samples a step, over all GPUs (default: the recipe's)")
    same("--row-tokens", type=positive(int), help="tokens a forward pass (default: the recipe's)")
    same("--epochs", type=positive(int),
         help="passes over the stage's data (default: the recipe's)")
    same("--lr-scale", type=lr_share, **SEVERAL, default=[], metavar="MODULE=SHARE",
         help="0 freezes a module, any other share trains it (default: the recipe's)")
    same("--max-tiles", type=tile_limit, default=9, help="tiles a page is cut into at most "
         "(default: %(default)s)")
    same("--shard-size", type=positive(int),
         help="GPUs that hold one copy of the model (default: all)")
    args = parser.parse_args()
    if bool(args.vision) != bool(args.llm):
        parser.error("--vision and --llm go together: two folders with released weights")
    args.shard_size = min(args.shard_size or args.gpus, args.gpus)
    if args.gpus % args.shard_size:
        parser.error(f"--shard-size {args.shard_size} does not divide --gpus {args.gpus}")
    return args


def released_config(vision: str, llm: str) -> AlignVLMConfig:
    """Of a SigLIP's and a Llama's folders, or names on the hub, of which only config.json is
    fetched: nobody waits for weights to learn whether they fit. Raises InputError."""
    folder = Path(vision) if os.path.exists(vision) else hub_folder(vision, weights=False)
    vision_config = SigLIPConfig(**siglip_sizes(folder))
    if os.path.exists(llm):
        llm_config, _ = read_llama(Path(llm))
    else:
        llm_config = LlamaConfig(**llama_sizes(hub_folder(llm, weights=False)))
    return AlignVLMConfig(vision_config, llm_config)


def main() -> None:
    args = parse_args()
    if args.llm is not None:
        config = released_config(args.vision, args.llm)
        args.preset = args.preset or preset_for(config.llm)
    else:
        args.preset = args.preset or "llama-3.2-1b"
        config = ALIGNVLM_PRESETS.get(args.preset, ALIGNVLM_PRESETS["llama-3.2-1b"])
    config = replace(config, connector=replace(config.connector, kind=args.connector))
    changes = {name: getattr(args, name) for name in ("batch_size", "row_tokens", "epochs")}
    stages = [args.stage] if args.stage else [stage for stage in RECIPES[args.preset] if stage > 0]
    for stage in stages:
        recipe = recipe_for(args.preset, stage, changes, dict(args.lr_scale))
        print_stage(stage, recipe, config, args)


if __name__ == "__main__":
    run_main(main)
