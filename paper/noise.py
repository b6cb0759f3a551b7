"""Gaussian noise on the visual features: the experiment of the paper's Table 3 (section 5.5).

    F~ = F + N,   N ~ N(0, sigma^2)

The noise of a sample depends on what the sample is called and on its number of tiles, never on the batch or the rank in
which it is read. sigma = 3 means something only beside the standard deviation of F, so that is measured too.
"""
import contextlib
import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as nnf      # F is the paper's name for the features
from PIL import Image
from torch import Tensor, nn

from model import AlignVLM
from vision import tile

STD_PAGES = 32          # pages that say what sigma / std(F) is


class Noise:
    """What happens to the features of a batch. samples: the name and the number of tiles of each, set before it is
    read; measured: for each what `summary` adds up, set while it is."""

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.samples: list[tuple[str, int]] = []
        self.measured: list[dict] = []

    def add(self, vision: nn.Module, inputs: tuple, F: Tensor) -> Tensor:
        """F (T, N, d), of all tiles of the batch -> F + N. A forward hook."""
        self.F = F
        generators = [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name, _ in self.samples]
        noise = torch.cat([torch.randn(tiles, *F.shape[1:], generator=generator)    # on the CPU: the same everywhere
                           for (_, tiles), generator in zip(self.samples, generators)])
        return F + self.sigma * noise.to(F)                                         # (T, N, d)

    def compare(self, connector: nn.Module, inputs: tuple, noisy: Tensor) -> None:
        """The connector's output (T, n, D) beside what it makes of F without noise. A forward hook."""
        clean = connector.forward(self.F, *inputs[1:])                              # (T, n, D): forward has no hooks
        distance = 1 - nnf.cosine_similarity(noisy.float(), clean.float(), dim=-1)  # (T, n)
        tiles = [tiles for _, tiles in self.samples]
        self.measured = [{"distance": d.sum(dtype=torch.float64).item(), "tokens": d.numel(),
                          "sum": F.sum(dtype=torch.float64).item(), "squares": F.double().square().sum().item(),
                          "numbers": F.numel()} for d, F in zip(distance.split(tiles), self.F.split(tiles))]


@contextlib.contextmanager
def noise_on(model: AlignVLM, sigma: float) -> Iterator[Noise | None]:
    """In here the connector receives F + N; nothing is changed, nor measured, where sigma is 0."""
    if sigma == 0:
        yield None
        return
    noise = Noise(sigma)
    hooks = model.vision.register_forward_hook(noise.add), model.connector.register_forward_hook(noise.compare)
    try:
        yield noise
    finally:
        for hook in hooks:
            hook.remove()


def summary(measured: list[dict]) -> dict[str, float]:
    """What was measured of each sample -> the standard deviation of F, over all its numbers, and the mean cosine
    distance, over all visual tokens, of the connector's outputs with and without noise."""
    total = {key: sum(sample[key] for sample in measured) for key in measured[0]}
    mean = total["sum"] / total["numbers"]
    return {"std_F": max(0.0, total["squares"] / total["numbers"] - mean ** 2) ** 0.5,
            "cosine_distance": total["distance"] / total["tokens"]}


@torch.inference_mode()
def feature_std(model: AlignVLM, pages: list[list[Image.Image]], max_tiles: int) -> float:
    """The standard deviation of F over some samples' pages, to three digits: another device computes the same."""
    n = total = squares = 0
    like = next(model.vision.parameters())
    for page in (page for sample in pages for page in sample):
        F = model.vision(tile(page, model.config.vision, max_tiles).to(like)).double()      # (T, N, d)
        n, total, squares = n + F.numel(), total + F.sum().item(), squares + F.square().sum().item()
    return float(f"{max(0.0, squares / n - (total / n) ** 2) ** 0.5:.3g}")
