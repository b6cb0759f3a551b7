"""Page -> tiles -> features F: stations 1 and 2 of the README (paper section 3.1, part 1).

A page is cut into at most 9 tiles by Ovis' coverage ratio. Each tile is resized onto a canvas of
S x S pixels, and a SigLIP vision transformer (https://arxiv.org/abs/2303.15343) turns it into N
features of size d, one for each patch.

    config = SIGLIP_PRESETS["so400m-patch14-384"]
    pixels = tile(read_image("page.png"), config)       # plumbing/images.py; (T, 3, 384, 384)
    F = SigLIP.from_pretrained("google/siglip-so400m-patch14-384")(pixels)  # (T, 729, 1152)

Parameters are named as in the released checkpoints (transformers' SiglipVisionModel), without a
prefix.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf      # F is the paper's name for the features
from PIL import Image
from torch import Tensor, nn

from plumbing import released
from plumbing.devices import send
from plumbing.weights import Weights, load, model_folder

# ------------------------------------------------------------------------------------------------
# Page -> tiles

# The part of a tile that the page fills: left, top, width, height, in pixels.
Area = tuple[int, int, int, int]


@dataclass
class SigLIPConfig:
    """A SigLIP vision tower and its preprocessing; the defaults are so400m-patch14-384's."""
    hidden_size: int = 1152            # d
    n_layers: int = 27
    n_heads: int = 16
    intermediate_size: int = 4304
    image_size: int = 384              # S, the side of a tile in pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    # Which state is F. None: last_hidden_state, after post_layernorm. An integer indexes
    # transformers' hidden_states: 0 is the embeddings, n_layers (or -1) the last layer's output.
    feature_layer: int | None = None
    image_mean: float = 0.5
    image_std: float = 0.5
    max_tiles: int = 9                 # of a page, unless somebody asks for another number

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile. 384 = 27 * 14 + 6: the last 6 pixels are dropped."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        """N, the number of features of one tile."""
        return self.patches_per_side ** 2


SIGLIP_PRESETS = {
    "so400m-patch14-384": SigLIPConfig(),
    # Mean 1: paper becomes 0 and only ink is a signal. With the usual 0.5 a small encoder that
    # starts from nothing spends its first tens of thousands of pages on the white background.
    "toy": SigLIPConfig(hidden_size=128, n_layers=2, n_heads=4, intermediate_size=256,
                        image_size=112, image_mean=1.0),
}


def choose_grid(width: int, height: int, side: int, max_tiles: int = 9) -> tuple[int, int]:
    """The (rows, columns) into which a page of width x height pixels is cut (Ovis 1.6).

    The fewest tiles that keep more than 90 % of the page's pixels win. Among grids of as many tiles
    the one that keeps the most wins. If no grid keeps 90 %, the one that keeps the most wins; among
    equals the one with fewer tiles, then the one with fewer rows. side: S, in pixels.
    """
    grids = []
    for rows in range(1, max_tiles + 1):
        for columns in range(1, max_tiles // rows + 1):
            if rows <= height and columns <= width:
                grids.append((rows, columns))
    ratio = {grid: coverage(width, height, side, *grid) for grid in grids}
    enough = [grid for grid in grids if ratio[grid] > 0.9]
    if enough:      # min keeps the first of equals
        return min(enough, key=lambda grid: (grid[0] * grid[1], -ratio[grid]))
    return min(grids, key=lambda grid: (-ratio[grid], grid[0] * grid[1]))


def coverage(width: int, height: int, side: int, rows: int, columns: int) -> float:
    """The share of a page's pixels that is left when each box is shrunk to a tile.

    A box is the part of the page that a tile shows. Its long side becomes `side` at most; a smaller
    box keeps its pixels. The last row and column of boxes take the remainder.
    """
    heights = [height // rows] * rows
    heights[-1] += height % rows
    widths = [width // columns] * columns
    widths[-1] += width % columns
    covered = 0.0
    for h in heights:
        for w in widths:
            long, short = max(h, w), min(h, w)
            if long <= side:
                covered += long * short
            else:
                covered += side * (short / long * side)
    return covered / (width * height)


def tile_boxes(width: int, height: int, config: SigLIPConfig,
               max_tiles: int | None = None) -> list[tuple[int, int, int, int]]:
    """The (left, top, right, bottom) of each tile in page pixels, row by row.

    If there are several, the whole page comes first as one more. max_tiles, here and below: the
    config's by default. Raises ValueError if it is less than 1.
    """
    if max_tiles is None:
        max_tiles = config.max_tiles
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; a page needs at least one tile")
    rows, columns = choose_grid(width, height, config.image_size, max_tiles)
    h, w = height // rows, width // columns
    boxes = []
    for r in range(rows):
        for c in range(columns):
            right = width if c == columns - 1 else (c + 1) * w
            bottom = height if r == rows - 1 else (r + 1) * h
            boxes.append((c * w, r * h, right, bottom))
    return boxes if len(boxes) == 1 else [(0, 0, width, height)] + boxes


def on_canvas(w: int, h: int, side: int) -> Area:
    """Where a box of w x h page pixels lies on its canvas.

    It keeps its aspect ratio, its long side becomes `side`, and it is centred.
    """
    if w >= h:
        width, height = side, max(1, int(h / w * side))
    else:
        width, height = max(1, int(w / h * side)), side
    return (side - width) // 2, (side - height) // 2, width, height


def tile(image: Image.Image, config: SigLIPConfig, max_tiles: int | None = None) -> Tensor:
    """A page -> its tiles: pixels (T, 3, S, S), float32, normalised; T <= max_tiles + 1."""
    return normalise(*cut(image, config, max_tiles), config)


def cut(image: Image.Image, config: SigLIPConfig,
        max_tiles: int | None = None) -> tuple[Tensor, list[Area]]:
    """A page -> its tiles as bytes (T, 3, S, S), uint8, and their T areas.

    image: upright, and without transparency, as plumbing/images.py reads it; what is transparent
    would show the colour that lies under it, often black. Each box is resized (bicubic) onto a
    canvas.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    boxes = tile_boxes(*image.size, config, max_tiles)
    side = config.image_size
    areas = [on_canvas(right - left, bottom - top, side) for left, top, right, bottom in boxes]
    pixels = np.zeros((len(boxes), side, side, 3), dtype=np.uint8)          # (T, S, S, 3)
    for canvas, box, (x, y, width, height) in zip(pixels, boxes, areas):
        crop = image.crop(box)
        if crop.size != (width, height):
            crop = crop.resize((width, height), Image.Resampling.BICUBIC)
        canvas[y:y + height, x:x + width] = np.asarray(crop)                # (height, width, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), areas


def normalise(pixels: Tensor, areas: list[Area], config: SigLIPConfig) -> Tensor:
    """What `cut` returns -> pixels for the encoder (T, 3, S, S), float32, on the same device.

    Beside its area a tile is 0, which is mid-grey for the released encoders.
    """
    # The CPU normalises the 256 values of a byte: so all devices have the same, to the bit.
    every_byte = torch.arange(256, dtype=torch.float32)                     # (256,)
    values = (every_byte / 255 - config.image_mean) / config.image_std      # (256,)
    values = send(values, pixels.device)
    normalised = torch.zeros_like(pixels, dtype=torch.float32)              # (T, 3, S, S)
    for canvas, tile_bytes, (x, y, width, height) in zip(normalised, pixels, areas):
        page = tile_bytes[:, y:y + height, x:x + width].int()               # (3, height, width)
        page = values.index_select(0, page.flatten()).view_as(page)         # float32
        canvas[:, y:y + height, x:x + width] = page
    return normalised


# ------------------------------------------------------------------------------------------------
# Tiles -> features


class SigLIP(nn.Module):
    """SigLIP's vision tower, without the pooling head that a vision-language model has no use for.

    Raises ValueError for a feature_layer that the tower does not have.
    """

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        n, layer = config.n_layers, config.feature_layer
        if layer is not None and not -n - 1 <= layer <= n:
            raise ValueError(f"feature_layer {layer} of an encoder with {n} layers")
        self.config = config
        self.depth = n if layer is None else layer          # how many layers run
        if self.depth < 0:
            self.depth += n + 1                             # -1: all of them
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (T, 3, S, S), normalised -> F (T, N, d), F_t = VisionEncoder(P_t) of every tile.

        F has the dtype of the weights. F = concat(F_1, ..., F_T) is F.flatten(0, 1) (T * N, d):
        AlignVLM.embed does it, after the connector.
        """
        x = self.embeddings(pixels)                         # (T, N, d)
        for layer in self.encoder["layers"][:self.depth]:
            x = layer(x)                                    # (T, N, d)
        if self.config.feature_layer is None:
            x = self.post_layernorm(x)                      # (T, N, d)
        return x

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None) -> "SigLIP":
        """The vision tower of a folder in hub format, or of a name on the hub, `owner/name`.

        dtype None keeps the stored one. shard: see `load` in plumbing/weights.py. Raises
        CheckpointError, one line that names the file and the key, or InputError for a name.
        """
        config, weights = read_siglip(model_folder(folder))
        return load(lambda: cls(config), {"": weights}, dtype, device, shard)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: every projection keeps its input's variance, and the
        position embeddings are N(0, 1 / d)."""
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                p.zero_()
            elif "position" in name:
                p.normal_(std=self.config.hidden_size ** -0.5)
            else:
                fan_in = p[0].numel()
                p.normal_(std=fan_in ** -0.5)


class Embeddings(nn.Module):
    """Patches -> vectors: one strided convolution plus a learned position embedding."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, d, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.n_patches, d)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (T, 3, S, S) -> (T, N, d), in the dtype of the weights."""
        pixels = pixels.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels)              # (T, d, sqrt(N), sqrt(N))
        patches = patches.flatten(2).transpose(1, 2)        # (T, N, d), row by row
        return patches + self.position_embedding.weight     # (T, N, d)


class Layer(nn.Module):
    """One pre-LayerNorm transformer block."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, N, d) -> (T, N, d)."""
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Attention(nn.Module):
    """Bidirectional multi-head attention among the patches of one tile."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        d = config.hidden_size
        self.n_heads = config.n_heads
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, N, d) -> (T, N, d)."""
        by_head = self.n_heads, -1
        q = self.q_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (T, heads, N, d / heads)
        k = self.k_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (T, heads, N, d / heads)
        v = self.v_proj(x).unflatten(-1, by_head).transpose(1, 2)   # (T, heads, N, d / heads)
        y = nnf.scaled_dot_product_attention(q, k, v)               # (T, heads, N, d / heads)
        y = y.transpose(1, 2).flatten(2)                            # (T, N, d)
        return self.out_proj(y)


class MLP(nn.Module):
    """Two layers with a GELU between, for each patch by itself."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return self.fc2(nnf.gelu(self.fc1(x), approximate="tanh"))


def read_siglip(folder: Path) -> tuple[SigLIPConfig, Weights]:
    """A folder in hub format, of both towers or one -> the architecture, where its weights are."""
    settings, weights = released.siglip(folder)
    return SigLIPConfig(**settings), weights
