"""Stage 0 of the reader's encoder: to name the characters that are printed in each patch.

    python -m reader.encoder --out out/reader/encoder   # the same command goes on where it ended

The readout, four characters of a patch in reading order, is thrown away after the lesson. It takes
the place of what a released SigLIP has seen.
"""
import argparse
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.data import Dataset

from plumbing.processes import run_main
from plumbing.settings import positive
from reader import training
from reader.drawing import N_CLASSES, SLOTS, SMALL_SIDE
from reader.pages import SIDE
from reader.quick import quicken
from reader.scraps import lesson
from vision import SigLIP, SigLIPConfig

# Patches of 14 pixels hold one to three characters of ordinary print.
CONFIG = SigLIPConfig(hidden_size=192, n_layers=5, n_heads=3, intermediate_size=768,
                      image_size=SMALL_SIDE, image_mean=1.0)
LARGE = replace(CONFIG, image_size=SIDE)    # one holds 20 of the 25 in reader/printed
# Most patches are blank, and most slots of the others: those count less.
BLANK_WEIGHTS = torch.tensor([0.15, 0.15, 0.08, 0.04])


class Scraps(Dataset):
    """Steps of `size` tiles of print: pixels (B, S, S, 3) uint8, classes (B, N, SLOTS) int64."""

    def __init__(self, seed: int, split: str, config: SigLIPConfig, size: int):
        self.seed, self.split, self.config, self.size = seed, split, config, size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        config = self.config
        tiles = [lesson(self.seed, self.split, i, config.image_size, config.patch_size)
                 for i in range(step * self.size, (step + 1) * self.size)]
        pixels, classes = zip(*tiles)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(classes))


def normalise(pixels: Tensor, config: SigLIPConfig) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) fp32."""
    pixels = (pixels.float() / 255 - config.image_mean) / config.image_std
    return pixels.permute(0, 3, 1, 2).contiguous()


def character_scores(modules: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """pixels (B, 3, S, S) -> scores (B, N, SLOTS, N_CLASSES), calculated in bf16."""
    with training.in_bf16():
        scores = modules["readout"](modules["vision"](pixels))      # (B, N, SLOTS * N_CLASSES)
    return scores.float().unflatten(-1, (SLOTS, N_CLASSES))


def loss_of(scores: Tensor, classes: Tensor) -> Tensor:
    """The weighted mean cross-entropy of all slots, in nats."""
    blank = BLANK_WEIGHTS.to(classes.device)                        # (SLOTS,)
    weights = torch.where(classes > 0, 1.0, blank)                  # (B, N, SLOTS)
    losses = nnf.cross_entropy(scores.flatten(0, 2), classes.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def scores_on(modules: nn.ModuleDict, held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Shares that are right: of first characters, of whole patches with print, of all characters,
    of blank patches."""
    right = []
    for pixels, classes in zip(*(t.split(16) for t in held_out)):
        scores = character_scores(modules, normalise(pixels, CONFIG))
        found = scores.argmax(-1)                                               # (16, N, SLOTS)
        right.append(found == classes)
    right, printed = torch.cat(right), held_out[1][..., 0] > 0                  # (n, N)
    share = lambda these: these.float().mean().item()
    return {"first": share(right[printed][:, 0]), "patch": share(right[printed].all(-1)),
            "characters": share(right[held_out[1] > 0]), "blank": share(right[~printed][:, 0])}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    vision = SigLIP(CONFIG)
    vision.init_weights()
    quicken(vision)
    readout = nn.Linear(CONFIG.hidden_size, SLOTS * N_CLASSES)
    modules = nn.ModuleDict({"vision": vision, "readout": readout})
    held_out = training.on_device(Scraps(args.seed, "held-out", CONFIG, 96)[0])

    def loss(pixels: Tensor, classes: Tensor) -> Tensor:
        return loss_of(character_scores(modules, normalise(pixels, CONFIG)), classes)

    training.train(modules, Scraps(args.seed, "train", CONFIG, args.batch_size), loss,
                   lambda: scores_on(modules, held_out), (0.9, 0.98), 0.05, args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reader.encoder", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=positive(int), default=16,
                        help="tiles a step (default: %(default)s)")
    training.add_flags(parser, "out/reader/encoder", 10_000)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(lambda: train(parse_args()))
