"""Train AlignVLM's three stages: captions, documents, instructions (paper section 3.3).

    python train.py                                     # the toy: all stages, on a laptop, in ten minutes
    python train.py --stage 1                           # one of them; it starts from the stage before's folder
    torchrun --nproc_per_node 8 train.py --stage 1 --vision siglip-so400m-patch14-384 --llm Llama-3.2-1B --out out/1b \\
        --data cc12m/                                   # on 8 GPUs, from two folders with released weights

Stage 0 stands for what a released LLM brings along: the toy's own LLM learns to read pages as plain text, before it
meets an image (the one in the box, toy/stage0, has done so already). Every stage writes a folder OUT/stageN, from which
the next one and sample.py start. The same command goes on where it was interrupted, and does not train again what is
complete.
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from connector import CONNECTORS, ConnectorConfig
from data import Sample, Tokenizer, encode_chat, fill_rows, pack_row, prepare
from plumbing.examples import Turn
from eval import held_out_scores, report
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, LLAMA_PRESETS, AlignVLM, AlignVLMConfig, read_config, read_llama
from plumbing.costs import plan, step_flops
from plumbing.logs import StepLog, plot
from plumbing.processes import ignore_signals, roll_call, run_main, start_processes, whole
from plumbing.runs import begin, check_recipe, is_complete, origin, recorded, stage_before
from plumbing.states import States, drop_states, newest_state
from plumbing.streams import BAD_KINDS, Documents, Position, agree_on_position, check_bad_share, deal, keep_good, steps_of
from plumbing.settings import InputError
from toy.looks import LOOKS
from toy.pages import ToyDocuments, write_toy_tokenizer

EVAL_SAMPLES = 64               # held-out samples of --eval-every
STOP = threading.Event()        # SIGTERM or SIGINT has come: finish the step, save, leave


@dataclass
class Recipe:
    """What one stage trains, and how. The first block is the paper's (appendix A.1; row_tokens is ours), the second
    MS-Swift's defaults, the third ours."""
    trainable: tuple[str, ...]
    batch_size: int = 512               # samples a step, over all ranks
    lr: float = 1e-5
    max_length: int = 1024              # text tokens a sample
    epochs: int = 1
    row_tokens: int = 16_384            # tokens a packed row, visual ones too: a step has as many rows as it takes

    warmup: float = 0.05                # share of the steps
    final_lr: float = 0.0               # where the cosine ends, as a share of lr
    weight_decay: float = 0.1           # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0                   # of the gradient's norm

    eps: float = 1e-8
    lr_scale: dict[str, float] = field(default_factory=dict)    # by module, times lr
    steps: int | None = None            # the toy draws its documents: it has steps, not epochs


ALL, LATE = ("vision", "connector", "llm"), ("connector", "llm")    # stage 3 freezes the vision encoder
# Adam moves what has a tiny gradient, like the head's rows of words that are never an answer, as far as anything else,
# and W2 starts from that head: an eps of 1e-5 holds them back.
TOY = dict(batch_size=16, row_tokens=8192, warmup=0.03, final_lr=0.1, eps=1e-5)
RECIPES = {
    "toy": {0: Recipe(("llm",), lr=1.5e-3, steps=3000, **TOY),
            1: Recipe(ALL, lr=1e-3, steps=200, lr_scale={"llm": 0.05}, **{**TOY, "warmup": 0.1}),
            2: Recipe(ALL, lr=1e-3, steps=300, **TOY),
            3: Recipe(LATE, lr=5e-4, steps=900, **{**TOY, "final_lr": 0.0})},
    "llama-3.2-1b": {1: Recipe(ALL), 2: Recipe(ALL, lr=5e-5, max_length=2048),
                     3: Recipe(LATE, lr=5e-5, max_length=2048, epochs=5)},
    "llama-3.2-3b": {1: Recipe(ALL), 2: Recipe(ALL, batch_size=256, lr=5e-5, max_length=2048),
                     3: Recipe(LATE, batch_size=256, lr=5e-5, max_length=2048, epochs=5)},
    "llama-3.1-8b": {1: Recipe(ALL), 2: Recipe(ALL, batch_size=256, lr=1e-5, max_length=2048),
                     3: Recipe(LATE, batch_size=256, lr=1e-5, max_length=2048, epochs=5)},
    # The second version's small setup: LLaVA-558K for the connector alone, then LLaVA-NeXT-779K. It gives the learning
    # rates; batch sizes and lengths are LLaVA's.
    "low-resource": {1: Recipe(("connector",), batch_size=256, lr=1e-3, max_length=2048),
                     2: Recipe(ALL, batch_size=128, lr=1e-5, max_length=4096, lr_scale={"vision": 0.2})},
}


# ---------------------------------------------------------------------------------------------------------------------
# The model, cut among ranks


def shard(model: AlignVLM, device: torch.device, shard_size: int | None = None, recompute: bool = False,
          compile: bool = False) -> None:
    """FSDP2: each block, the connector and the vision tower are gathered when they run. What is left, the word
    embedding foremost, stays gathered: connector, decoder and head share it. On CUDA the computation is bf16.

    shard_size: ranks that hold one copy of the model between them; by default all (the paper's ZeRO-3). Groups of
    fewer, say of one node, are each other's replicas, and only gradients travel between them (hybrid).
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    world = dist.get_world_size()
    size = min(shard_size or world, world)
    if world % size:
        raise InputError(f"--shard-size {size} does not divide the {world} processes")
    shape = (world,) if size == world else (world // size, size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    blocks = [*model.vision.encoder["layers"], *model.llm.layers]
    for block in blocks:
        if recompute:       # keep a block's input alone, and run it again in the backward pass
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.compile()
    for module in [*blocks, model.vision, model.connector, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to final_lr * lr."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, recipe.steps - warmup))))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def optimizer_of(model: AlignVLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the stage's modules; weight decay on matrices alone. A group's scale multiplies the learning rate."""
    return torch.optim.AdamW(
        [{"params": [p for p in getattr(model, name).parameters() if (p.ndim > 1) == matrices],
          "weight_decay": recipe.weight_decay if matrices else 0.0, "scale": recipe.lr_scale.get(name, 1.0)}
         for name in recipe.trainable for matrices in (True, False)], betas=recipe.betas, eps=recipe.eps, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# One step


def match_ranks(rows: list[list[Sample]], config: AlignVLMConfig) -> tuple[list[list[Sample]], Counter]:
    """The rows of this rank, so that all ranks call the same modules equally often: under FSDP they wait otherwise.

    A rank with fewer rows than another gets blank ones, and a row without an image a blank tile if any rank has one.
    Also returns what all ranks have together: tokens (visual ones too), supervised ones, blank ones, tiles, images, and
    the sum of the samples' squared lengths.
    """
    most = torch.tensor([len(rows), any(len(s.pixels) for row in rows for s in row)], dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    n_rows, seen = most.tolist()
    n, side = (config.tile_tokens if seen else 1), config.vision.image_size
    blank = Sample(torch.full((n,), IMAGE if seen else 0), torch.full((n,), IGNORE), torch.zeros(seen, 3, side, side),
                   "blank")
    rows = [row if row and (not seen or any(len(s.pixels) for s in row)) else [*row, blank]
            for row in rows + [[]] * (n_rows - len(rows))]
    samples = [s for row in rows for s in row]
    lengths, real = [len(s.tokens) for s in samples], [s for s in samples if s is not blank]
    counts = dict(tokens=sum(lengths), supervised=sum(int((s.labels != IGNORE).sum()) for s in real),
                  blank=n * (len(samples) - len(real)), tiles=sum(len(s.pixels) for s in samples),
                  images=sum(s.n_images for s in real), squares=sum(length ** 2 for length in lengths))
    totals = torch.tensor([*counts.values()])
    dist.all_reduce(totals)
    return rows, Counter(dict(zip(counts, totals.tolist())))


def row_loss(model: AlignVLM, row: list[Sample], device: torch.device) -> Tensor:
    """The sum of a row's cross-entropies, in nats."""
    tokens, labels, pixels, lengths = pack_row(row)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels       # else the copy would wait for the GPU
    return model(tokens, labels, pixels.to(device, non_blocking=True), lengths)


def accumulate_gradients(model: AlignVLM, rows: list[list[Sample]],
                         device: torch.device) -> tuple[Tensor | None, Counter, list[Tensor]]:
    """Gradients of the mean loss over all supervised tokens of a step, on all ranks, however it is split into rows.

    Returns that loss (nats per token; None, and no gradients, if there is nothing to learn from), match_ranks' counts,
    and the sums of this rank's rows. The losses stay on the device.
    """
    rows, counts = match_ranks(rows, model.config)
    if counts["supervised"] == 0 or counts["tiles"] == 0 and not model.llm.norm.weight.requires_grad:
        return None, counts, []     # text passes the LLM alone
    losses = []
    for i, row in enumerate(rows):
        model.set_requires_all_reduce(i == len(rows) - 1)           # between replicas; within them at every row
        loss = row_loss(model, row, device)
        (loss * dist.get_world_size() / counts["supervised"]).backward()        # times the ranks: FSDP averages
        losses.append(loss.detach())
    total = sum(losses)
    dist.all_reduce(total)
    return total / counts["supervised"], counts, losses


def take_step(model: AlignVLM, optimizer: torch.optim.Optimizer, rows: list[list[Sample]], lr: float, clip: float,
              device: torch.device) -> tuple[Tensor | None, torch.cuda.Event | None, Counter]:
    """One step of the optimizer, unless the loss or the gradient is not finite: then all ranks skip it.

    The device decides that, and the host does not wait for it. Returns the loss, the gradient's norm and the losses of
    this rank's rows in one tensor (None if there was nothing to learn from), which the host has after the event that
    comes with it, if one does; and match_ranks' counts.
    """
    loss, counts, losses = accumulate_gradients(model, rows, device)
    if loss is None:
        return None, None, counts
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(params, clip).full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    bad = ~(loss.isfinite() & norm.isfinite())
    optimizer.found_inf = bad.float()               # as GradScaler does it: the fused step then changes nothing
    optimizer.step()
    optimizer.zero_grad()
    numbers = torch.stack([loss, norm, *losses]).to("cpu", non_blocking=True)
    return numbers, torch.cuda.current_stream().record_event() if loss.is_cuda else None, counts


@dataclass
class Progress:
    """How far a stage has come."""
    step: int = 0
    position: Position = field(default_factory=Position)
    holes: Counter = field(default_factory=Counter)     # bad samples by kind, and how many were seen
    skipped: int = 0                                    # steps whose loss or gradient was not finite

    def record(self) -> dict:
        """What goes with a training state, as JSON."""
        return {**vars(self), "position": vars(self.position)}

    @classmethod
    def of(cls, record: dict, path: Path) -> "Progress":
        """From the record of the training state at `path`. Raises InputError where it is damaged."""
        try:
            return cls(**{**record, "position": Position(**record["position"]), "holes": Counter(record["holes"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / 'progress.json'}: damaged ({error}): delete {path}") from None


# ---------------------------------------------------------------------------------------------------------------------
# One stage


@torch.no_grad()
def evaluate(stage: int, model: AlignVLM, tokenizer: Tokenizer, held_out: Dataset, recipe: Recipe, args,
             device: torch.device) -> dict[str, float]:
    """The held-out loss (nats per supervised token, all ranks'); from stage 2 on also how the toy reads and answers."""
    references = itertools.islice((r for r, _ in held_out.draws(Position()) if r is not None), EVAL_SAMPLES)
    samples = map(held_out.__getitem__, itertools.islice(references, dist.get_rank(), None, dist.get_world_size()))
    rows = fill_rows([s for s in samples if isinstance(s, Sample)], recipe.row_tokens)
    rows, counts = match_ranks(rows, model.config)
    total = sum((row_loss(model, row, device) for row in rows), torch.zeros((), device=device))
    dist.all_reduce(total)
    scores = {"held_out_loss": total.item() / max(1, counts["supervised"])}
    if args.preset == "toy" and stage > 1 and args.held_out:
        scores |= held_out_scores(whole(model), tokenizer, min(50, args.held_out), args.seed, args.look)["held-out"]
    return scores


def samples_of(stage: int, recipe: Recipe, tokenizer: Tokenizer, config: AlignVLMConfig,
               args) -> tuple[Dataset, Dataset | None]:
    """What a stage learns from, and what it is evaluated on: --data and --eval-data, or the toy's pages."""
    if not args.data or stage == 0:
        return tuple(ToyDocuments(stage, n, args.seed, tokenizer, config.vision, split, config.tile_tokens, args.look)
                     for n, split in [(recipe.steps * recipe.batch_size, "train"), (EVAL_SAMPLES, "held-out")])
    settings = dict(tokenizer=tokenizer, config=config.vision, max_tiles=args.max_tiles, max_text=recipe.max_length,
                    max_tokens=recipe.row_tokens, tile_tokens=config.tile_tokens)
    encode_chat([Turn("user", [])], tokenizer, [])      # refuses here, not sample by sample
    documents = Documents(args.data, args.seed, functools.partial(prepare, **settings))
    if args.steps is None:      # for the schedule and the bar; the stage ends where its last epoch does
        recipe.steps = math.ceil(recipe.epochs * documents.epoch_samples() / recipe.batch_size)
    return documents, Documents(args.eval_data, args.seed, functools.partial(prepare, **settings)) if args.eval_data else None


def train_stage(stage: int, recipe: Recipe, model: AlignVLM, tokenizer: Tokenizer, path: Path | None, args,
                device: torch.device) -> bool:
    """Train one stage of a sharded model on --data, or else on the toy's pages, from the state at `path` on, if any.

    A line of log.jsonl per step, per resumption and per evaluation. Returns whether the stage is complete; if not, it
    was asked to stop, and its state is saved.
    """
    rank, world, config = dist.get_rank(), dist.get_world_size(), model.config
    folder = args.out / f"stage{stage}.partial"
    optimizer = optimizer_of(model, recipe)
    documents, held_out = samples_of(stage, recipe, tokenizer, config, args)
    states = States(folder, model, optimizer, args.keep, args.timeout)
    p = Progress.of(states.load(path), path) if path else Progress()

    order = deal(documents.draws(p.position), recipe.batch_size, rank, world)
    ahead = max(2, recipe.batch_size // (world * args.workers)) if args.workers else None       # about a step
    loader = DataLoader(documents, batch_size=None, sampler=order, num_workers=args.workers, prefetch_factor=ahead,
                        worker_init_fn=ignore_signals)

    def is_over() -> bool:
        return p.step >= args.steps if args.steps else p.position.epoch >= recipe.epochs

    flops = functools.partial(step_flops, config, recipe.trainable)
    with StepLog(folder / "log.jsonl", stage, recipe.steps, p, device, flops) as log:
        steps = steps_of(loader)
        while not is_over():
            samples, position = next(steps)     # this rank's share of a step, and the place in the data after it
            # All ranks: are we at the same place, and was anyone asked to stop?
            if agree_on_position(position, STOP.is_set() or p.step >= (args.max_steps or math.inf)):
                log.settle()
                states.save(p.step, p.record())
                break
            rows = fill_rows(keep_good(samples, documents, p.holes), recipe.row_tokens)
            if p.holes["seen"] >= 1000 or position.epoch > p.position.epoch:
                check_bad_share(p.holes, args.max_bad)
            lr = learning_rate(p.step, recipe)
            numbers, sent, counts = take_step(model, optimizer, rows, lr, recipe.clip, device)
            bad = {kind: p.holes[kind] for kind in BAD_KINDS if p.holes[kind]}
            log.step(dict(step=p.step, epoch=p.position.epoch, lr=lr, bad=bad), counts,
                     [[s.key for s in row] for row in rows], numbers, sent)
            p.step, p.position = p.step + 1, position
            states.finish(wait=bool(log.blamed))        # before ten bad steps the last good state is in its place
            if is_over() or p.step % args.save_every == 0:
                log.settle()
                if is_over() or not log.blamed:
                    states.save(p.step, p.record())
            if args.eval_every and p.step % args.eval_every == 0:
                log.settle()
                log.write(step=p.step - 1, **evaluate(stage, model, tokenizer, held_out, recipe, args, device))
        states.finish()
    return is_over()


def connector_of(stage: int, folder: Path, args) -> ConnectorConfig:
    """What the flags ask for in stage 1, then what the folder has. Raises InputError if they ask for another."""
    if stage <= 1:
        sizes = ALIGNVLM_PRESETS["llama-3.2-1b" if args.llm else "toy"].connector
        return replace(sizes, **args.connector_settings if stage == 1 else {})
    connector = read_config(folder).connector
    if replace(connector, **args.connector_settings) != connector:
        raise InputError(f"{folder} has the connector {connector.kind}: another, or another table, begins with stage 1")
    return connector


def build(stage: int, start: Path, recipe: Recipe, connector: ConnectorConfig, args, device: torch.device) -> AlignVLM:
    """The model as a stage starts, in fp32 and sharded: from released weights, from the folder `start`, or for the
    toy's first stage from scratch. Sharding comes before reading, so that a rank reads no more than its part."""
    def freeze_and_shard(model: AlignVLM) -> None:
        for name, module in model.named_children():
            module.requires_grad_(name in recipe.trainable)
        shard(model, device, args.shard_size, args.recompute, args.compile)

    torch.manual_seed(args.seed)
    if stage == 1 and args.llm:
        return AlignVLM.from_backbones(args.vision, args.llm, torch.float32, device, freeze_and_shard, connector)
    if stage > 0:
        connector = connector if stage == 1 else None       # later stages keep what the folder has
        return AlignVLM.from_pretrained(start, torch.float32, device, freeze_and_shard, connector)
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    model.init_weights()
    freeze_and_shard(model.to(device))
    return model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group
    add = group("what is trained").add_argument
    add("--preset", choices=list(RECIPES), help="recipe (default: by the size of --llm or of the "
        "model in --out, that of llama-3.2-1b for a size that is none of these; without either the toy's)")
    add("--vision", type=Path, help="folder with a released SigLIP, for stage 1 (default: the toy's own)")
    add("--llm", type=Path, help="folder with a released Llama and its tokenizer, for stage 1 (default: the toy's own)")
    add("--connector", choices=CONNECTORS, help="between the two, new in stage 1, kept from then on (default: align)")
    add("--table-size", type=int, help="rows of the table of --connector ovis (default: 65536, the toy's: 1024)")
    add("--stage", type=int, choices=[0, 1, 2, 3], help="train this stage only (default: all, in order)")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps of each stage (default: the recipe's)")
    add("--batch-size", type=int, help="samples a step, over all processes (default: the recipe's)")
    add("--row-tokens", type=int, help="tokens a forward pass, visual ones too; a process's share of a step takes as "
        "many as it needs (default: the recipe's)")
    add("--max-length", type=int, help="text tokens a sample, cut at its end (default: the recipe's)")
    add("--epochs", type=int, help="passes over --data (default: the recipe's)")
    add("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add("--lr-scale", nargs="+", default=[], metavar="MODULE=SHARE", help="what vision, connector or llm has of --lr: "
        "vision=0.2; 0 freezes it, any other share trains it (default: the recipe's)")
    add = group("data").add_argument
    add("--data", nargs="+", metavar="PATH[:WEIGHT]", help="what --stage learns from: folders, files or globs of tar "
        "(img2dataset), parquet (BigDocs, VCR-wiki), JSONL or JSON (DocDownstream, MS-Swift, LLaVA); with weights the "
        "data sets are mixed in that ratio (default: the toy's drawn pages)")
    add("--look", choices=LOOKS, default="clean", help="how the toy's pages are drawn; hard ones have reports "
        "of up to nine tiles among them in stage 3 (default: %(default)s)")
    add("--max-tiles", type=int, help="tiles a page is cut into at most (default: 9)")
    add("--max-bad", type=float, default=0.01, help="share of bad samples above which training stops, judged from a "
        "thousand samples or an epoch on (default: %(default)s)")
    add("--workers", type=int, help="data loading processes per process (default: with --data up to 4, else 0)")
    add = group("the run").add_argument
    add("--out", type=Path, help="the run's folder (default: out/PRESET)")
    add("--retrain", action="store_true", help="train also what is already complete in --out")
    add("--resume", default="auto", metavar="auto|never|PATH", help="go on from the newest training state in --out, "
        "begin the stage anew and drop its states, or go back to the one at PATH (default: %(default)s)")
    add("--save-every", type=int, default=200, help="steps between training states (default: %(default)s)")
    add("--keep", type=int, default=2, help="training states that are kept (default: %(default)s)")
    add("--max-steps", type=int, help="save and leave after so many steps of the stage; more, or none, goes on")
    add("--eval-every", type=int, help="steps between evaluations of the held-out loss (default: none)")
    add("--eval-data", nargs="+", metavar="PATH", help="held-out data for it, as for --data (the toy draws its own)")
    add("--held-out", type=int, default=200, help="documents the toy reads at the end (default: %(default)s; 0: none)")
    add("--plot", type=Path, nargs="+", metavar="RUN", help="only draw loss and throughput of runs' folders, or of "
        "log.jsonl files, into OUT/plot.png (needs `pip install matplotlib`)")
    add = group("the machines").add_argument
    add("--shard-size", type=int, help="processes that hold one copy of the model between them (default: all of them)")
    add("--recompute", action="store_true", help="compute activations twice instead of keeping them")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--timeout", type=float, default=600, help="seconds to wait for a stalled process (default: %(default)s)")
    add("--plan", action="store_true", help="only say what training takes: memory per GPU, step time, days")
    add("--gpus", type=int, default=64, help="for --plan (default: %(default)s)")
    add("--gpu-memory", type=float, default=80, help="GB of each, for --plan (default: %(default)s)")
    add("--mfu", type=float, default=0.4, help="share of an H100's 989 TFLOP/s, for --plan (default: %(default)s)")
    args = parser.parse_args()
    for name in ("steps batch_size row_tokens max_length epochs lr max_tiles save_every keep max_steps eval_every "
                 "table_size shard_size timeout gpus gpu_memory mfu").split():
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is more than 0")
    args.workers = args.workers if args.workers is not None else min(4, os.cpu_count()) if args.data else 0
    scales = [re.fullmatch(r"(vision|connector|llm)=(\d*\.?\d+)", scale) for scale in args.lr_scale]
    for impossible, why in [
            (not all(scales), f"--lr-scale {' '.join(args.lr_scale)}: vision, connector or llm, =, and a share"),
            (min(args.workers, args.held_out) < 0, "--workers and --held-out are at least 0"),
            (not 0 <= args.seed < 2 ** 63, "--seed is from 0 to 2**63 - 1"),
            (not 0 <= args.max_bad <= 1, "--max-bad is from 0 to 1"),
            (args.data and args.look != "clean", "--look is of the toy's pages, not of --data"),
            (not (args.data or args.plan) and (args.epochs or args.max_length or args.max_tiles or args.eval_data),
             "--epochs, --max-length, --max-tiles and --eval-data are of --data: the toy's pages have --steps"),
            (args.data and not args.stage, "--data is for one stage: add --stage 1, 2 or 3"),
            (args.data and args.eval_every and not args.eval_data, "--eval-every needs --eval-data beside --data"),
            (args.stage is None and args.resume not in ("auto", "never"), "--resume PATH is of a stage: add --stage"),
            (bool(args.vision) != bool(args.llm), "--vision and --llm go together: two folders with released weights"),
            (args.table_size and args.connector != "ovis", "--table-size is for --connector ovis")]:
        if impossible:
            parser.error(why)
    flags = {"kind": args.connector, "table_size": args.table_size}
    args.connector_settings = {key: value for key, value in flags.items() if value}
    args.lr_scale = {scale[1]: float(scale[2]) for scale in scales}
    args.max_tiles = args.max_tiles or 9
    args.timeout = timedelta(seconds=min(args.timeout, 1e8))
    return args


def choose_preset(args) -> str:
    """The recipe for the LLM's size: that of --llm, or of the folder where --stage starts; without either the toy's."""
    started = args.out / f"stage{args.stage - 1}" if args.out and args.stage else None
    if not args.llm and not (started and (started / "config.json").exists()):
        return "toy"
    llm = read_llama(args.llm)[0] if args.llm else read_config(started).llm
    sizes = {(preset.hidden_size, preset.n_layers): name for name, preset in LLAMA_PRESETS.items()}
    return sizes.get((llm.hidden_size, llm.n_layers), "llama-3.2-1b")


def recipe_of(stage: int, args) -> Recipe:
    """The preset's recipe for a stage, with what the flags say instead. Raises InputError."""
    given = {name: getattr(args, name) for name in ("steps", "batch_size", "row_tokens", "max_length", "epochs", "lr")}
    recipe = replace(RECIPES[args.preset][stage], **{k: v for k, v in given.items() if v is not None})
    if args.lr_scale:
        recipe.lr_scale = {**recipe.lr_scale, **args.lr_scale}
        recipe.trainable = tuple(name for name in ALL if args.lr_scale.get(name, name in recipe.trainable))
        if not recipe.trainable:
            raise InputError(f"--lr-scale leaves nothing to train in stage {stage}")
    return recipe


def run_stage(stage: int, args, device: torch.device, restarted: bool) -> bool:
    """Build, train and export one stage, unless that is done. Returns whether it is complete."""
    recipe, launch = recipe_of(stage, args), os.environ.get("TORCHELASTIC_RUN_ID")
    start = args.llm if stage == 1 and args.llm else stage_before(stage, args.out)
    folder, partial, main_rank = args.out / f"stage{stage}", args.out / f"stage{stage}.partial", dist.get_rank() == 0
    # What torchrun restarts goes on with what this launch has begun, whatever the command says.
    resume = "auto" if restarted and recorded(partial, "launch") == launch else args.resume
    retrain = args.retrain and not (restarted and recorded(folder, "launch") == launch)
    complete = [is_complete(stage, args.out) and not retrain]
    dist.broadcast_object_list(complete)        # the first rank decides: another may see the disk as it was
    if stage > 1 and not complete[0] and not (start / "config.json").exists():
        raise InputError(f"stage {stage} starts from stage {stage - 1}, and {args.out} has none: train that first")
    connector = connector_of(stage, folder if complete[0] else start, args)
    record = {"preset": args.preset, "seed": args.seed, "data": args.data if stage else None,
              "look": args.look if stage else "clean", "max_tiles": args.max_tiles,
              "connector": connector.kind, "table_size": connector.table_size,
              **asdict(recipe), "origin": origin(start), "launch": launch}
    record = json.loads(json.dumps(record))
    if complete[0]:
        check_recipe(folder, {**record, "origin": None}, "--retrain")       # is_complete has looked at that
        if main_rank:
            drop_states(folder)
            print(f"stage {stage} is complete in {folder} (--retrain trains it again)")
        return True
    # A tokenizer goes with its LLM: the released one's, or that of the folder from which the stage starts.
    source = start if stage > 0 else partial
    model = build(stage, start, recipe, connector, args, device)
    # Read before begin(), so that a folder without a usable one leaves nothing behind; stage 0 writes its own below.
    tokenizer = Tokenizer(source, model.config.llm.vocab_size) if stage > 0 else None
    path = [begin(partial, record, model, resume, args.keep) if main_rank else None]
    if stage == 0 and main_rank:
        write_toy_tokenizer(partial / "tokenizer.model")
    dist.broadcast_object_list(path)
    tokenizer = tokenizer or Tokenizer(source, model.config.llm.vocab_size)
    if not train_stage(stage, recipe, model, tokenizer, path[0], args, device):
        if main_rank:
            print(f"stage {stage} has stopped, its state is in {newest_state(partial)}: the same command goes on")
        return False
    model.save_pretrained(folder, tokenizer.path, torch.float32 if args.preset == "toy" else torch.bfloat16)
    if main_rank:
        drop_states(folder)
    return True


def main() -> None:
    args = parse_args()
    args.preset = args.preset or ("llama-3.2-1b" if args.plan and not args.llm else choose_preset(args))
    args.out = args.out or Path("out") / args.preset
    if args.plot:
        return plot(args.plot, args.out / "plot.png")
    stages = [stage for stage in RECIPES[args.preset] if stage > 0] if args.stage is None else [args.stage]
    if stages[0] not in RECIPES[args.preset] or args.plan and stages[0] == 0:
        raise InputError(f"--preset {args.preset} has no stage {stages[0]}" + (" to plan" if args.plan else ""))
    if args.plan:
        return plan(args, {stage: recipe_of(stage, args) for stage in stages})
    if args.preset != "toy" and args.steps is None and not args.data:
        raise InputError(f"the recipe {args.preset} counts epochs, drawn pages have none: give --data or --steps")
    if not args.llm and 1 in stages and (args.retrain or not is_complete(1, args.out)):
        if args.preset != "toy":
            raise InputError(f"the recipe {args.preset} is for released weights: give stage 1 --vision and --llm")
        if not (stage_before(1, args.out) / "config.json").exists():
            stages = [0, *stages]       # the toy's LLM is pretrained, as a released one is
    device, restarted = start_processes(args.timeout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())
    with roll_call(args.timeout):
        complete = all(run_stage(stage, args, device, restarted) for stage in stages)
        if complete and args.preset == "toy" and 3 in stages and args.held_out and dist.get_rank() == 0:
            report(args.out / "stage3", args.held_out, args.seed, args.look, device)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
