"""Stage 0 of the reader's encoder: to name the characters that are printed in each patch.

    python -m reader.encoder --out out/reader/encoder   # the same command goes on where it ended

The readout, four characters of a patch in reading order, is thrown away after the lesson. It takes
the place of what a released SigLIP has seen.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from plumbing.processes import run_main
from plumbing.runs import claim
from reader.drawing import N_CLASSES, SLOTS
from reader.quick import quicken
from reader.scraps import lesson
from reader.states import Log, learning_rate, load_state, save_state
from vision import SigLIP, SigLIPConfig

# Patches of 14 pixels hold one to three characters of ordinary print.
CONFIG = SigLIPConfig(hidden_size=192, n_layers=5, n_heads=3, intermediate_size=768,
                      image_size=224, image_mean=1.0)
# Most patches are blank, and most slots of the others: those count less.
BLANK_WEIGHTS = torch.tensor([0.15, 0.15, 0.08, 0.04])


class Scraps(Dataset):
    """Tiles of print: pixels (S, S, 3) uint8, classes (N, SLOTS) int64."""

    def __init__(self, seed: int, split: str, config: SigLIPConfig):
        self.seed, self.split, self.config = seed, split, config

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, classes = lesson(self.seed, self.split, index, self.config.image_size,
                                 self.config.patch_size)
        return torch.from_numpy(np.array(pixels)), torch.from_numpy(classes)


def batches(data: Dataset, start: int, steps: int, size: int, workers: int) -> DataLoader:
    """Batches of consecutive lessons, from step `start` on."""
    return DataLoader(data, size, sampler=range(start * size, steps * size), num_workers=workers,
                      prefetch_factor=8 if workers else None)


def normalise(pixels: Tensor, config: SigLIPConfig) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) fp32."""
    pixels = (pixels.float() / 255 - config.image_mean) / config.image_std
    return pixels.permute(0, 3, 1, 2).contiguous()


def named(modules: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """pixels (B, 3, S, S) -> scores (B, N, SLOTS, N_CLASSES), calculated in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = modules["readout"](modules["vision"](pixels))      # (B, N, SLOTS * N_CLASSES)
    return scores.float().unflatten(-1, (SLOTS, N_CLASSES))


def loss_of(scores: Tensor, classes: Tensor) -> Tensor:
    """The weighted mean cross-entropy of all slots, in nats."""
    weights = torch.where(classes > 0, 1.0, BLANK_WEIGHTS)          # (B, N, SLOTS)
    losses = nnf.cross_entropy(scores.flatten(0, 2), classes.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def scores_on(modules: nn.ModuleDict, held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Shares that are right: of first characters, of whole patches with print, of blank ones."""
    right = []
    for pixels, classes in zip(*(t.split(16) for t in held_out)):
        found = named(modules, normalise(pixels, CONFIG)).argmax(-1)            # (16, N, SLOTS)
        right.append(found == classes)
    right, printed = torch.cat(right), held_out[1][..., 0] > 0                  # (n, N)
    share = lambda these: these.float().mean().item()
    return {"first": share(right[printed][:, 0]), "patch": share(right[printed].all(-1)),
            "characters": share(right[held_out[1] > 0]), "blank": share(right[~printed][:, 0])}


def train(args) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    vision = SigLIP(CONFIG)
    vision.init_weights()
    quicken(vision)
    modules = nn.ModuleDict({"vision": vision, "readout": nn.Linear(CONFIG.hidden_size,
                                                                    SLOTS * N_CLASSES)})
    params = list(modules.parameters())
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    claim(args.out)
    state, step, minutes = args.out / "state.safetensors", 0, 0.0
    if state.exists():
        record = load_state(state, modules, optimizer)
        step, minutes = record["step"], record["minutes"]
    log = Log(args.out / "log.jsonl", minutes)
    held_out = [Scraps(args.seed, "held-out", CONFIG)[i] for i in range(96)]
    held_out = tuple(torch.stack(part) for part in zip(*held_out))
    total, since = 0.0, time.monotonic()
    for pixels, classes in batches(Scraps(args.seed, "train", CONFIG), step, args.steps,
                                   args.batch_size, args.workers):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(named(modules, normalise(pixels, CONFIG)), classes)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, total = step + 1, total + loss.item()
        if step % args.log_every == 0:
            seconds, since = time.monotonic() - since, time.monotonic()
            scores = scores_on(modules, held_out) if step % args.eval_every == 0 else {}
            log.write(step=step, loss=total / args.log_every,
                      seconds=seconds / args.log_every, **scores)
            total = 0.0
        if step % args.save_every == 0 or step == args.steps:
            save_state(state, modules, optimizer, {"step": step, "minutes": log.minutes,
                                                   "seed": args.seed, "steps": args.steps})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/reader/encoder"), help="where state and log go")
    add("--steps", type=int, default=10_000, help="(default: %(default)s)")
    add("--batch-size", type=int, default=16, help="tiles a step (default: %(default)s)")
    add("--lr", type=float, default=1.5e-3, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="that train (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    add("--log-every", type=int, default=50, help="steps (default: %(default)s)")
    add("--eval-every", type=int, default=400, help="steps (default: %(default)s)")
    add("--save-every", type=int, default=200, help="steps (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(lambda: train(parse_args()))
