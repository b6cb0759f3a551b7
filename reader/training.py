"""The loop of stage 0's three lessons, and a training's state in one file: weights, Adam's moments,
and how far it has come."""
import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing.devices import send
from plumbing.processes import keep_heap
from plumbing.runs import claim
from plumbing.settings import InputError, a_path, positive, whole
from plumbing.workers import loaded, start_worker

MOMENTS = ("exp_avg", "exp_avg_sq")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(modules: nn.ModuleDict, data: Dataset, loss_of: Callable[..., Tensor],
          scores: Callable[[], dict[str, float]], betas: tuple[float, float], weight_decay: float,
          args: argparse.Namespace) -> None:
    """Train until args.steps, from the state in args.out on, if there is one. Changes the modules.

    data[step]: a step's batch, which loss_of makes a loss of. scores: of held-out pages; it is
    called at every args.eval_every-th step that is also logged. args: add_flags's. Modules and
    batches go to DEVICE. Writes OUT/state.safetensors and OUT/log.jsonl. Raises InputError.
    """
    keep_heap()
    claim(args.out)
    modules.to(DEVICE)
    parameters = list(modules.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    state, step, minutes = args.out / "state.safetensors", 0, 0.0
    if state.exists():
        record = load_state(state, modules, optimizer)
        step, minutes = record["step"], record["minutes"]
    log = Log(args.out / "log.jsonl", minutes)
    total, since = 0.0, time.monotonic()
    loader = DataLoader(data, None, sampler=range(step, args.steps), num_workers=args.workers,
                        prefetch_factor=8 if args.workers else None, worker_init_fn=start_worker)
    for batch in tqdm(loaded(loader), initial=step, total=args.steps, mininterval=60):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(*on_device(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        total += loss.item()
        if step % args.log_every == 0:
            seconds = (time.monotonic() - since) / args.log_every
            held_out = scores() if step % args.eval_every == 0 else {}
            log.write(step=step, loss=total / args.log_every, seconds=seconds, **held_out)
            total, since = 0.0, time.monotonic()
        if step % args.save_every == 0 or step == args.steps:
            save_state(state, modules, optimizer, {"step": step, "minutes": log.minutes,
                                                   "seed": args.seed, "steps": args.steps})


def on_device(batch: tuple) -> tuple:
    """A batch, whose tensors go to DEVICE."""
    return tuple(send(x, DEVICE) if isinstance(x, Tensor) else x for x in batch)


def in_bf16() -> torch.autocast:
    """Calculates in bf16, with weights in fp32."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def add_flags(parser: argparse.ArgumentParser, out: str, steps: int) -> None:
    """What every lesson takes; their defaults of --out and --steps."""
    add = parser.add_argument
    add("--out", type=a_path, default=Path(out),
        help="where state and log go (default: %(default)s)")
    add("--steps", type=whole, default=steps, help="(default: %(default)s)")
    add("--lr", type=positive(float), default=1.5e-3, help="at its highest (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--threads", type=positive(int), default=2, help="that train (default: %(default)s)")
    add("--workers", type=whole, default=1, help="processes that draw (default: %(default)s)")
    add("--log-every", type=positive(int), default=50, help="steps (default: %(default)s)")
    add("--eval-every", type=positive(int), default=250, help="steps (default: %(default)s)")
    add("--save-every", type=positive(int), default=100, help="steps (default: %(default)s)")


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
            optimizer.state[p] = {"step": torch.tensor(float(record["step"]), device=p.device)} | {
                moment: tensors[f"{moment}/{name}"].to(p.device) for moment in MOMENTS}
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
