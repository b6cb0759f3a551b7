"""Random weights, and the measure of "equal"."""
import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: a bias of 0 or a norm's weight of 1 hides that it is ignored."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.ndim > 1:
            p.copy_(noise * p[0].numel() ** -0.5)
        else:
            p.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return module


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5,
          scale: float | None = None) -> None:
    """Equal within `tolerance` of the largest value of theirs, or of `scale`."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert theirs.isfinite().all()
    scale = theirs.abs().max().item() if scale is None else scale
    assert scale > 0, "all zero: the comparison would show nothing"
    error = (ours - theirs).abs().max().item()
    assert error <= tolerance * scale, f"off by {error:.3g} at values up to {scale:.3g}"


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
