"""The reader's model for larger tiles, from stage 2 on."""
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from data import Tokenizer
from model import AlignVLM
from reader.encoder import LARGE

POSITIONS = "vision.embeddings.position_embedding.weight"       # (N, d)


def enlarge(folder: Path, out: Path) -> None:
    """Write the model of `folder` to `out` with tiles as LARGE has them, and all else the same."""
    model = AlignVLM.from_pretrained(folder, torch.float32)
    weights = model.state_dict()
    weights[POSITIONS] = enlarged(weights[POSITIONS], LARGE.patches_per_side)
    vision = replace(model.config.vision, image_size=LARGE.image_size)
    larger = AlignVLM(replace(model.config, vision=vision))
    larger.load_state_dict(weights)
    larger.save_pretrained(out, Tokenizer(folder).path, torch.float32)


def enlarged(positions: Tensor, side: int) -> Tensor:
    """Position embeddings of a square of patches (N, d) -> those of side * side, interpolated."""
    before = round(len(positions) ** 0.5)
    grid = positions.unflatten(0, (before, before)).permute(2, 0, 1)        # (d, rows, columns)
    grid = nnf.interpolate(grid[None], (side, side), mode="bilinear")[0]    # (d, side, side)
    return grid.flatten(1).T.contiguous()                                   # (side * side, d)
