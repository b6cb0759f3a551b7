"""A training's state in one file: weights, Adam's moments, and how far it has come; and its log."""
import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from plumbing.settings import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100,
                  falling: float = 0.3) -> float:
    """Warm-up, then constant, then along a cosine to nearly zero over the last `falling` share.

    So a training can be lengthened, or ended early, with all that it has done still of use.
    """
    left = max(0.0, min(1.0, (steps - step) / (falling * steps)))
    cosine = 0.5 - 0.5 * torch.cos(torch.tensor(torch.pi * left)).item()
    return peak * min((step + 1) / warmup, 0.02 + 0.98 * cosine)


def save_state(path: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer,
               record: dict) -> None:
    """Write a state beside `path`, then rename: the file there is always complete."""
    tensors = dict(modules.state_dict())
    for name, p in modules.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[p][moment]
    partial = path.with_suffix(".partial")
    save_file({k: t.contiguous() for k, t in tensors.items()}, partial,
              {"record": json.dumps(record)})
    partial.replace(path)


def load_state(path: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer | None) -> dict:
    """Fill modules and optimizer from a state; returns its record."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            record = json.loads(file.metadata()["record"])
        modules.load_state_dict({k: t for k, t in tensors.items() if "/" not in k})
        for name, p in modules.named_parameters() if optimizer else ():
            optimizer.state[p] = {"step": torch.tensor(float(record["step"]))} | {
                moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: no state of this training ({str(error).splitlines()[0]})"
                         ) from None
    return record


class Log:
    """Lines of JSON beside the state, and on the screen."""

    def __init__(self, path: Path, minutes: float = 0.0):
        self.path, self.start = path, time.monotonic() - 60 * minutes

    @property
    def minutes(self) -> float:
        """Since the training began, pauses between runs not counted."""
        return (time.monotonic() - self.start) / 60

    def write(self, **values) -> None:
        row = {"minutes": round(self.minutes, 2)} | {
            k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{k} {v}" for k, v in row.items()), flush=True)
