"""A model for larger tiles: a whole sheet of small print cannot be read in tiles of 224 pixels."""
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as nnf

from data import Tokenizer
from model import AlignVLM

LARGE_SIDE = 392        # of a tile in pixels, 28 patches, from the reader's stage 2 on
POSITIONS = "vision.embeddings.position_embedding.weight"       # (N, d)


def enlarge(folder: Path, out: Path, side: int) -> None:
    """Write the model of `folder` to `out` with tiles of `side` pixels, and all else the same.

    Its position embeddings, one for each patch of a tile, are interpolated (bilinear).
    """
    model = AlignVLM.from_pretrained(folder, torch.float32)
    vision = replace(model.config.vision, image_size=side)
    before, after = model.config.vision.patches_per_side, vision.patches_per_side
    weights = model.state_dict()
    positions = weights[POSITIONS].unflatten(0, (before, before)).permute(2, 0, 1)  # (d, row, col)
    positions = nnf.interpolate(positions[None], (after, after), mode="bilinear")[0]
    weights[POSITIONS] = positions.flatten(1).T.contiguous()                        # (N, d)
    larger = AlignVLM(replace(model.config, vision=vision))
    larger.load_state_dict(weights)
    larger.save_pretrained(out, Tokenizer(folder).path, torch.float32)
