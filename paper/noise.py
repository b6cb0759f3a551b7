"""Gaussian noise on the visual features: the experiment of the paper's Table 3 (section 5.5).

    F~ = F + N,   N ~ N(0, sigma^2)       N is the noise here, as in section 5.5

The noise of a sample depends on what the sample is called and on its number of tiles, never on the
batch or the rank in which it is read. sigma = 3 means something only beside the standard deviation
of F, so that is measured too.
"""
import contextlib
import zlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as nnf       # F is the paper's name for the features
from PIL import Image
from torch import Tensor, nn

from model import AlignVLM
from vision import tile

STD_PAGES = 32          # samples whose pages say what std(F) is


class Noise:
    """What happens to the features of a batch.

    samples: the name and the number of tiles of each, to be set before the batch is read.
    measured: of each sample the numbers that `summary` adds up, set while it is read.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.samples: list[tuple[str, int]] = []
        self.measured: list[dict] = []
        self.F: Tensor | None = None            # the batch's features, without noise

    def add(self, vision: nn.Module, inputs: tuple, F: Tensor) -> Tensor:
        """F (T, N, d), of all tiles of the batch -> F + noise, F~. A forward hook."""
        self.F = F
        noise = []
        for name, tiles in self.samples:        # drawn on the CPU: the same on every device
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise.append(torch.randn(tiles, *F.shape[1:], generator=generator))
        return F + self.sigma * torch.cat(noise).to(F)                              # (T, N, d)

    def compare(self, connector: nn.Module, inputs: tuple, noisy: Tensor) -> None:
        """The connector's output (T, n, D) beside what it makes of F without noise.

        A forward hook. It calls `forward` itself, which calls no hooks. Sets `measured`.
        """
        clean = connector.forward(self.F, *inputs[1:])                              # (T, n, D)
        distance = 1 - nnf.cosine_similarity(noisy.float(), clean.float(), dim=-1)  # (T, n)
        tiles = [tiles for _, tiles in self.samples]
        self.measured = []
        for of_sample, F in zip(distance.split(tiles), self.F.split(tiles)):
            self.measured.append({
                "distance": of_sample.sum(dtype=torch.float64).item(),
                "tokens": of_sample.numel(),
                "sum": F.sum(dtype=torch.float64).item(),
                "squares": F.double().square().sum().item(),
                "numbers": F.numel()})


@contextlib.contextmanager
def noise_on(model: AlignVLM, sigma: float) -> Iterator[Noise | None]:
    """In here the connector receives F~; nothing is changed, nor measured, where sigma is 0."""
    if sigma == 0:
        yield None
        return
    noise = Noise(sigma)
    hooks = [model.vision.register_forward_hook(noise.add),
             model.connector.register_forward_hook(noise.compare)]
    try:
        yield noise
    finally:
        for hook in hooks:
            hook.remove()


def summary(measured: list[dict]) -> dict[str, float]:
    """What was measured of each sample -> std_F and cosine_distance.

    std_F is the standard deviation of F over all its numbers. The distance is that of the
    connector's outputs with and without noise, the mean over all visual tokens.
    """
    total = {key: sum(sample[key] for sample in measured) for key in measured[0]}
    std = standard_deviation(total["numbers"], total["sum"], total["squares"])
    return {"std_F": std, "cosine_distance": total["distance"] / total["tokens"]}


def standard_deviation(n: int, total: float, squares: float) -> float:
    """Of n numbers, from their sum and the sum of their squares."""
    variance = squares / n - (total / n) ** 2
    return max(0.0, variance) ** 0.5            # rounding may go below


@torch.inference_mode()
def feature_std(model: AlignVLM, pages: Iterable[list[Image.Image]],
                max_tiles: int | None) -> float:
    """The standard deviation of F over some samples' pages.

    It has three digits: another device computes the same.
    """
    n, total, squares = 0, 0.0, 0.0
    device = model.llm.embed_tokens.weight.device
    for sample in pages:
        for page in sample:
            pixels = tile(page, model.config.vision, max_tiles).to(device)          # (T, 3, S, S)
            F = model.vision(pixels).double()                                       # (T, N, d)
            n += F.numel()
            total += F.sum().item()
            squares += F.square().sum().item()
    return float(f"{standard_deviation(n, total, squares):.3g}")
