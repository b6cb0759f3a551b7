"""Train AlignVLM's three stages: captions, documents, instructions (paper section 3.3).

    python train.py                                     # the toy: all stages, on a laptop, in ten minutes
    python train.py --stage 1                           # one of them; it starts from the last one's checkpoint
    torchrun --nproc_per_node 8 train.py --stage 1 --vision siglip-so400m-patch14-384 --llm Llama-3.2-1B --out out/1b
                                                        # on 8 GPUs, from two folders with released weights

Stage 0 stands for what a released LLM brings along: the toy's own LLM learns to read pages as plain text, before it
meets an image. Every stage writes a folder OUT/stageN (config.json, model.safetensors, tokenizer.model, log.jsonl)
from which the next stage and sample.py start; one that is complete is not trained again.
"""
import argparse
import ctypes
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import READ, Tokenizer, ToyDocuments, answer, draw, edit_distance, held_out_documents, pack, write_toy_tokenizer
from model import ALIGNVLM_PRESETS, IGNORE, LLAMA_PRESETS, AlignVLM, CheckpointError, read_llama


@dataclass
class Recipe:
    """What one stage trains, and how. The paper states the first block (appendix A.1), MS-Swift's defaults the second."""
    trainable: tuple[str, ...]
    batch_size: int = 512               # samples a step, over all ranks
    lr: float = 1e-5
    max_length: int = 1024              # text tokens a sample
    epochs: int = 1

    warmup: float = 0.05                # share of the steps
    final_lr: float = 0.0               # where the cosine ends, as a share of lr
    weight_decay: float = 0.1           # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0                   # of the gradient's norm

    steps: int | None = None            # the toy draws its documents: it has steps, not epochs


class InputError(ValueError):
    """Bad input from the command line; the message is one line that says what to do."""


ALL, LATE = ("vision", "connector", "llm"), ("connector", "llm")    # stage 3 freezes the vision encoder
TOY = dict(batch_size=16, warmup=0.03, final_lr=0.1)
RECIPES = {
    "toy": {0: Recipe(("llm",), lr=1.5e-3, steps=900, **TOY),
            1: Recipe(ALL, lr=1e-3, steps=400, **TOY),
            2: Recipe(ALL, lr=1e-3, steps=800, **TOY),
            3: Recipe(LATE, lr=5e-4, steps=400, **TOY)},
    "llama-3.2-1b": {1: Recipe(ALL), 2: Recipe(ALL, lr=5e-5, max_length=2048),
                     3: Recipe(LATE, lr=5e-5, max_length=2048, epochs=5)},
    "llama-3.2-3b": {1: Recipe(ALL), 2: Recipe(ALL, 256, 5e-5, 2048), 3: Recipe(LATE, 256, 5e-5, 2048, 5)},
    "llama-3.1-8b": {1: Recipe(ALL), 2: Recipe(ALL, 256, 1e-5, 2048), 3: Recipe(LATE, 256, 1e-5, 2048, 5)},
}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to final_lr * lr."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def shard(model: AlignVLM, device: torch.device) -> None:
    """FSDP2, full sharding (the paper's ZeRO-3): each block, the connector and the vision tower are gathered when they
    run; what is left, the word embedding foremost, stays gathered, for the connector, the decoder and its head share it.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*model.vision.encoder["layers"], model.vision, model.connector, *model.llm.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def batch_indices(recipe: Recipe, micro: int) -> list[list[int]]:
    """The sample indices of this rank's micro-batches, in order. Step s owns the interval [s * B, (s + 1) * B), so a
    step learns from the same samples on any number of ranks. Raises InputError where B cannot be shared evenly."""
    rank, world, B = dist.get_rank(), dist.get_world_size(), recipe.batch_size
    if B % (world * micro):
        raise InputError(f"a batch of {B} is not a multiple of {world} processes x {micro} samples: "
                         "change --batch-size or --micro-batch")
    return [list(range(first + rank * micro, first + (rank + 1) * micro))
            for step in range(recipe.steps) for first in range(step * B, (step + 1) * B, world * micro)]


def accumulate_gradients(model: AlignVLM, batches: list[tuple], device: torch.device) -> tuple[float, int]:
    """Gradients of the mean loss over all supervised tokens of a step, on all ranks, however it is split into
    micro-batches. Returns that loss (nats per token) and the step's number of tokens."""
    counts = torch.tensor([sum(int((labels != IGNORE).sum()) for _, labels, _, _ in batches),
                           sum(tokens.numel() for tokens, _, _, _ in batches)], device=device)
    dist.all_reduce(counts)
    supervised, n_tokens = counts.tolist()
    if supervised == 0:
        raise InputError("a step without a single supervised token: no answer in its samples")
    total = torch.zeros((), device=device)
    for i, (tokens, labels, pixels, lengths) in enumerate(batches):
        model.set_requires_gradient_sync(i == len(batches) - 1)
        loss = model(tokens.to(device), labels.to(device), pixels.to(device), lengths)      # a sum
        (loss * dist.get_world_size() / supervised).backward()      # times the ranks: FSDP averages over them
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / supervised, n_tokens


def train_stage(stage: int, recipe: Recipe, model: AlignVLM, tokenizer: Tokenizer, args, device: torch.device) -> None:
    """Train one stage of a sharded model, a line of log.jsonl per step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
                                   {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}],
                                  betas=recipe.betas, fused=True)
    micro = args.micro_batch or max(1, recipe.batch_size // world)
    documents = ToyDocuments(stage, recipe.steps * recipe.batch_size, args.seed, tokenizer, model.config.vision)
    loader = iter(DataLoader(documents, batch_sampler=batch_indices(recipe, micro), collate_fn=pack,
                             num_workers=args.workers, pin_memory=device.type == "cuda"))
    log = args.out / f"stage{stage}.partial" / "log.jsonl" if rank == 0 else os.devnull
    with open(log, "w") as log, tqdm(range(recipe.steps), f"stage {stage}", disable=rank > 0, mininterval=1) as bar:
        for step in bar:
            start = time.perf_counter()
            batches = [next(loader) for _ in range(recipe.batch_size // (world * micro))]
            loss, n_tokens = accumulate_gradients(model, batches, device)
            norm = torch.nn.utils.clip_grad_norm_(params, recipe.clip).full_tensor().item()
            lr = learning_rate(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            speed = n_tokens / (time.perf_counter() - start)
            log.write(json.dumps({"stage": stage, "step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                                  "tokens_per_s": speed}) + "\n")
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)


def held_out_scores(model: AlignVLM, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, dict]:
    """Read n held-out documents aloud and answer one question about each, greedily, 50 at a time.

    Returns, for "all" and each kind, exact_match (of answers), cer (edit distance over reference characters) and n.
    """
    documents = held_out_documents(n, seed)
    right, errors, characters, count = (Counter() for _ in range(4))
    for first in tqdm(range(0, n, 50), desc="held-out"):
        some = documents[first:first + 50]
        images = [draw(page) for page, _, _ in some]
        texts = answer(model, tokenizer, images, [READ] * len(some))
        answers = answer(model, tokenizer, images, [prompt for _, prompt, _ in some])
        for (page, _, gold), text, prediction in zip(some, texts, answers):
            for group in ("all", page.kind, "several tiles" if page.large else "one tile"):
                right[group] += prediction == gold
                errors[group] += edit_distance(text, page.text)
                characters[group] += len(page.text)
                count[group] += 1
    return {group: {"exact_match": right[group] / count[group], "cer": errors[group] / characters[group],
                    "n": count[group]} for group in sorted(count)}


def build(stage: int, recipe: Recipe, args, device: torch.device) -> AlignVLM:
    """The model as a stage starts, in fp32 and sharded: from released weights, from the last stage's folder, or for
    the toy's first stage from scratch. Sharding comes before reading, so that a rank reads no more than its part."""
    def prepare(model: AlignVLM) -> None:
        for name, module in model.named_children():
            module.requires_grad_(name in recipe.trainable)
        shard(model, device)

    torch.manual_seed(args.seed)
    if stage == 1 and args.llm:
        return AlignVLM.from_backbones(args.vision, args.llm, torch.float32, device, prepare)
    if stage > 0:
        model = AlignVLM.from_pretrained(args.out / f"stage{stage - 1}", torch.float32, device, prepare)
        if stage == 1:
            model.connector.init_weights(model.llm.head)        # W2 starts from the head that stage 0 has trained
        return model
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    model.vision.init_weights()
    model.llm.init_weights()
    model.connector.init_weights(model.llm.head)
    prepare(model.to(device))
    return model


def keep_heap() -> None:
    """Let glibc keep freed memory: by default each large buffer goes back to the kernel, and its pages fault in anew
    at the next operation, a third of a training step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


def start_processes() -> torch.device:
    """Join torchrun's processes, or be the only one; nccl on CUDA, gloo on a CPU."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(RECIPES), help="recipe (default: by the size of --llm; without one the toy's)")
    add("--vision", type=Path, help="folder with a released SigLIP, for stage 1 (default: the toy's own)")
    add("--llm", type=Path, help="folder with a released Llama and its tokenizer, for stage 1 (default: the toy's own)")
    add("--stage", type=int, choices=[0, 1, 2, 3], help="train this stage only (default: all, in order)")
    add("--out", type=Path, help="the run's folder (default: out/PRESET)")
    add("--retrain", action="store_true", help="train also what is already complete in --out")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps of each stage (default: the recipe's)")
    add("--batch-size", type=int, help="samples a step, over all processes (default: the recipe's)")
    add("--micro-batch", type=int, help="samples a forward pass, per process; the rest accumulates (default: all)")
    add("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add("--workers", type=int, default=0, help="data loading processes per process (default: %(default)s)")
    add("--held-out", type=int, default=200, help="held-out documents read at the end (default: %(default)s; 0: none)")
    args = parser.parse_args()
    if bool(args.vision) != bool(args.llm):
        parser.error("--vision and --llm go together: two folders with released weights")
    return args


def choose_preset(args) -> str:
    """The recipe that was asked for, or the one that goes with the size of --llm; the toy's without one."""
    if args.preset is None and args.llm:
        llm = read_llama(args.llm)[0]
        sizes = {(config.hidden_size, config.n_layers): name for name, config in LLAMA_PRESETS.items()}
        return sizes.get((llm.hidden_size, llm.n_layers), "llama-3.2-1b")
    return args.preset or "toy"


def main() -> None:
    args = parse_args()
    args.preset = choose_preset(args)
    args.out = args.out or Path("out") / args.preset
    keep_heap()
    device = start_processes()
    main_rank, world = dist.get_rank() == 0, dist.get_world_size()
    complete = [stage for stage in range(4) if (args.out / f"stage{stage}" / "config.json").exists()]
    stages = [args.stage] if args.stage is not None else [1, 2, 3]
    if 1 in stages and 0 not in complete and not args.llm:
        stages = [0, *stages]       # the toy's LLM is pretrained, as a released one is
    if args.preset != "toy" and (0 in stages or args.steps is None):
        raise InputError(f"the recipe {args.preset} " + (
            "is for released weights: give stage 1 --vision and --llm" if 0 in stages else
            "counts epochs, which drawn pages do not have: give --steps"))
    for stage in stages:
        folder = args.out / f"stage{stage}"
        if stage in complete and not args.retrain:
            if main_rank:
                print(f"stage {stage} is complete in {folder} (--retrain trains it again)")
            continue
        given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr}
        recipe = replace(RECIPES[args.preset][stage], **{k: v for k, v in given.items() if v is not None})
        partial = folder.with_name(folder.name + ".partial")
        if stage == 0 and main_rank:
            args.out.mkdir(parents=True, exist_ok=True)
            write_toy_tokenizer(args.out / "tokenizer.model")
        dist.barrier()
        # A tokenizer goes with its LLM: the released one's, or the one in the folder from which the stage starts.
        source = args.out if stage == 0 else args.llm if stage == 1 and args.llm else args.out / f"stage{stage - 1}"
        model = build(stage, recipe, args, device)
        tokenizer = Tokenizer(source, model.config.llm.vocab_size)
        if main_rank:
            partial.mkdir(parents=True, exist_ok=True)
        train_stage(stage, recipe, model, tokenizer, args, device)
        model.save_pretrained(folder, tokenizer.path, torch.float32 if args.preset == "toy" else torch.bfloat16)
    folder = args.out / "stage3"
    if main_rank and 3 in stages and args.held_out:
        model = AlignVLM.from_pretrained(folder, device=device).eval()
        scores = held_out_scores(model, Tokenizer(folder, model.config.llm.vocab_size), args.held_out, args.seed)
        (folder / "held_out.json").write_text(json.dumps(scores, indent=2) + "\n")
        for group in [*(group for group in scores if group != "all"), "all"]:
            name, s = "held-out" if group == "all" else group, scores[group]
            print(f"{name}: exact_match={s['exact_match']:.3f} cer={s['cer']:.3f} n={s['n']}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
