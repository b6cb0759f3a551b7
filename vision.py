"""Page -> tiles -> features F: stations 1 and 2 of the README (paper section 3.1, part 1).

A page is cut into at most 9 tiles by Ovis' coverage ratio, each tile is resized onto an S x S canvas, and a SigLIP
vision transformer (https://arxiv.org/abs/2303.15343) turns it into N feature vectors of size d, one per patch.

    config = SIGLIP_PRESETS["so400m-patch14-384"]
    pixels = tile(read_image("page.png"), config)      # (T, 3, 384, 384)
    F = SigLIP.from_pretrained("siglip-so400m-patch14-384")(pixels)       # (T, 729, 1152)

The parameter names are those of the released checkpoints (transformers' SiglipVisionModel), without any prefix.
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
from plumbing.fast import Linear
from plumbing.weights import Weights, load


@dataclass
class SigLIPConfig:
    """The architecture of a SigLIP vision tower and its preprocessing; the defaults are so400m-patch14-384's."""
    hidden_size: int = 1152            # d
    n_layers: int = 27
    n_heads: int = 16
    intermediate_size: int = 4304
    image_size: int = 384              # S, the side of a tile in pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    # Which state is F: None is last_hidden_state (after post_layernorm); an integer indexes transformers'
    # hidden_states, where 0 is the embeddings and n_layers the last layer's output without post_layernorm.
    feature_layer: int | None = None
    image_mean: float = 0.5
    image_std: float = 0.5

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile: the convolution is "valid", so 384 = 27 * 14 + 6 drops 6 pixels."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        """N, the number of features of one tile."""
        return self.patches_per_side ** 2


SIGLIP_PRESETS = {
    "so400m-patch14-384": SigLIPConfig(),
    # Mean 1: paper becomes 0 and only ink is a signal. With the usual 0.5 a small encoder trained from scratch
    # spends its first tens of thousands of pages on the white background.
    "toy": SigLIPConfig(hidden_size=128, n_layers=2, n_heads=4, intermediate_size=256, image_size=112, image_mean=1.0),
}


class Embeddings(nn.Module):
    """Patches -> vectors: one strided convolution plus a learned position embedding."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, d, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.n_patches, d)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (T, 3, S, S) -> (T, N, d)."""
        patches = self.patch_embedding(pixels)              # (T, d, side, side)
        patches = patches.flatten(2).transpose(1, 2)        # (T, N, d), row by row
        return patches + self.position_embedding.weight     # (T, N, d)


class Attention(nn.Module):
    """Bidirectional multi-head attention among the patches of one tile."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        d = config.hidden_size
        self.n_heads = config.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, N, d) -> (T, N, d)."""
        T, N, d = x.shape
        q, k, v = (proj(x).view(T, N, self.n_heads, -1).transpose(1, 2)      # (T, heads, N, d / heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = nnf.scaled_dot_product_attention(q, k, v)                        # (T, heads, N, d / heads)
        return self.out_proj(y.transpose(1, 2).reshape(T, N, d))


class MLP(nn.Module):
    """Two layers with a GELU between, for each patch by itself."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        return self.fc2(nnf.gelu(self.fc1(x), approximate="tanh"))


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
        return x + self.mlp(self.layer_norm2(x))


class SigLIP(nn.Module):
    """The vision tower of SigLIP without its pooling head, which a vision-language model does not use."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        if config.feature_layer is not None and not -config.n_layers - 1 <= config.feature_layer <= config.n_layers:
            raise ValueError(f"feature_layer {config.feature_layer} of an encoder with {config.n_layers} layers")
        self.config = config
        # How many layers run: feature_layer, counted from the end if negative, or all.
        self.depth = range(config.n_layers + 1)[-1 if config.feature_layer is None else config.feature_layer]
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.n_layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (T, 3, S, S), normalised -> F (T, N, d): F_t = VisionEncoder(P_t) of every tile; same dtype.

        F = concat(F_1, ..., F_T) is F.flatten(0, 1) (T * N, d): AlignVLM.embed does it, after the connector.
        """
        x = self.embeddings(pixels)                         # (T, N, d)
        for layer in self.encoder["layers"][:self.depth]:
            x = layer(x)                                    # (T, N, d)
        return self.post_layernorm(x) if self.config.feature_layer is None else x

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        shard: Callable[[nn.Module], None] | None = None) -> "SigLIP":
        """The vision tower of a folder in hub format; dtype None keeps the stored one.

        shard: see plumbing/weights.py's load. Raises CheckpointError, one line that names the file and the key.
        """
        config, weights = read_siglip(Path(folder))
        return load(lambda: cls(config), {"": weights}, dtype, device, shard)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: every projection keeps its input's variance."""
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(float(name.endswith("weight")))
            elif name.endswith("bias"):
                p.zero_()
            elif "position" in name:
                p.normal_(std=self.config.hidden_size ** -0.5)
            else:
                p.normal_(std=p[0].numel() ** -0.5)


def read_siglip(folder: Path) -> tuple[SigLIPConfig, Weights]:
    """A folder in hub format, of both towers or the vision tower alone -> its architecture, where its weights are."""
    config, weights = released.siglip(folder)
    return SigLIPConfig(**config), weights


# ---------------------------------------------------------------------------------------------------------------------
# Pages and tiles


def choose_grid(width: int, height: int, side: int, max_tiles: int = 9) -> tuple[int, int]:
    """The (rows, columns) into which a page of width x height pixels is cut, by Ovis 1.6's coverage ratio.

    A grid's coverage is the share of the page's pixels that survive when each box is scaled down until its long side
    is `side` pixels. The fewest tiles that keep more than 90 % win; if none do, the grid that keeps the most.
    """
    def coverage(rows: int, columns: int) -> float:
        heights = [height // rows] * (rows - 1) + [height - height // rows * (rows - 1)]
        widths = [width // columns] * (columns - 1) + [width - width // columns * (columns - 1)]
        covered = 0.0
        for long, short in ((max(h, w), min(h, w)) for h in heights for w in widths):
            covered += long * short if long <= side else side * (short / long * side)
        return covered / (width * height)

    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)
             if r <= height and c <= width]
    ratios = {grid: coverage(*grid) for grid in grids}
    enough = [grid for grid in grids if ratios[grid] > 0.9]
    if enough:
        return min(enough, key=lambda g: (g[0] * g[1], -ratios[g]))     # min keeps the first of equals
    return min(grids, key=lambda g: (-ratios[g], g[0] * g[1]))


def tile_boxes(width: int, height: int, config: SigLIPConfig, max_tiles: int = 9) -> list[tuple[int, int, int, int]]:
    """The (left, top, right, bottom) of each tile in page pixels; of several, the whole page comes first."""
    rows, columns = choose_grid(width, height, config.image_size, max_tiles)
    h, w = height // rows, width // columns
    boxes = [(c * w, r * h, width if c == columns - 1 else (c + 1) * w, height if r == rows - 1 else (r + 1) * h)
             for r in range(rows) for c in range(columns)]
    return boxes if len(boxes) == 1 else [(0, 0, width, height)] + boxes


def on_canvas(w: int, h: int, side: int) -> tuple[int, int, int, int]:
    """Where a box of w x h page pixels lies on its canvas: (left, top, width, height) in canvas pixels.

    It keeps its aspect ratio, its long side becomes `side`, and it is centred.
    """
    width, height = (side, max(1, int(h / w * side))) if w >= h else (max(1, int(w / h * side)), side)
    return (side - width) // 2, (side - height) // 2, width, height


def tile(image: Image.Image, config: SigLIPConfig, max_tiles: int = 9) -> Tensor:
    """A page -> its tiles, pixels (T, 3, S, S) in float32, normalised; T <= max_tiles + 1 with the whole page.

    Each box is resized (bicubic) onto a canvas of zeros in normalised space (mid-grey for the released encoders), see
    on_canvas. Raises ValueError if max_tiles < 1.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; a page needs at least one tile")
    side = config.image_size
    image = image if image.mode == "RGB" else image.convert("RGB")
    boxes = tile_boxes(*image.size, config, max_tiles)
    pixels = np.zeros((len(boxes), side, side, 3), dtype=np.float32)
    for canvas, (left, top, right, bottom) in zip(pixels, boxes):
        x, y, *new = on_canvas(right - left, bottom - top, side)
        crop = image.crop((left, top, right, bottom))
        crop = crop if crop.size == tuple(new) else crop.resize(new, Image.Resampling.BICUBIC)
        canvas[y:y + new[1], x:x + new[0]] = (np.asarray(crop, np.float32) / 255 - config.image_mean) / config.image_std
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()    # (T, 3, S, S)
