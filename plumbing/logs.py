"""log.jsonl, a line per step: written while training, read again, drawn."""
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.costs import mfu, peak_memory
from plumbing.settings import InputError


def open_log(path: Path):
    """log.jsonl, to be continued, a line at once; one that a kill has cut off is taken away."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


class StepLog:
    """The first rank's log.jsonl and its bar: a line per step, per resumption and per evaluation.

    A step is judged and logged when its numbers are there: a GPU sends them while the host is busy with the next one.
    """

    def __init__(self, path: Path, stage: int, n_steps: int, progress, device: torch.device,
                 flops: Callable[[Counter], float]):
        """progress: a train.Progress, whose skipped steps are counted here; flops: of a step with its counts."""
        self.stage, self.progress, self.device, self.flops = stage, progress, device, flops
        self.under_way, self.blamed = [], []        # the step that is not judged; the suspects of each skipped one
        self.file = open_log(path if dist.get_rank() == 0 else Path(os.devnull))
        self.bar = tqdm(desc=f"stage {stage}", total=n_steps, initial=progress.step, disable=dist.get_rank() > 0,
                        mininterval=1)
        self.start = time.perf_counter()
        if self.file.tell():
            self.write(resumed=progress.step, processes=dist.get_world_size())

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.file.close()

    def write(self, **row) -> None:
        """Add a line; the next step's time begins after it."""
        self.file.write(json.dumps({"stage": self.stage, **row}) + "\n")
        self.start = time.perf_counter()

    def step(self, row: dict, counts: Counter, keys: list[list[str]], numbers: torch.Tensor | None,
             sent: torch.cuda.Event | None) -> None:
        """Log a step. keys: its samples', row by row; numbers and sent: train.take_step's. Raises InputError."""
        self.settle()
        self.under_way.append((row, counts, keys, numbers, sent))
        if sent is None:        # on a CPU nothing is under way any more
            self.settle()

    def settle(self) -> None:
        """Judge and log what is under way. Raises InputError, on all ranks, after ten skipped steps in a row."""
        if not self.under_way:
            return
        row, counts, keys, numbers, sent = self.under_way.pop()
        if sent:
            sent.synchronize()
        now = time.perf_counter()
        seconds = now - self.start
        loss, norm, *losses = [None, None] if numbers is None else numbers.tolist()
        if loss is not None and not (math.isfinite(loss) and math.isfinite(norm)):
            suspects = [key for row_keys, n in zip(keys, losses) if not math.isfinite(n) for key in row_keys]
            self.blamed.append(suspects or sum(keys, []))
            self.progress.skipped, loss, norm = self.progress.skipped + 1, None, None
        else:
            self.blamed.clear()
        check_blamed(self.blamed, row["step"])
        speed, flops_per_s = (counts["tokens"] - counts["blank"]) / seconds, self.flops(counts) / seconds
        self.write(**row, loss=loss, grad_norm=norm, tokens_per_s=speed, images_per_s=counts["images"] / seconds,
                   padding=counts["blank"] / max(1, counts["tokens"]), peak_memory=peak_memory(self.device),
                   flops_per_s=flops_per_s, mfu=mfu(flops_per_s / dist.get_world_size(), self.device),
                   skipped=self.progress.skipped)
        self.start = now
        self.bar.update()
        self.bar.set_postfix_str(f"loss {math.nan if loss is None else loss:.3f}, lr {row['lr']:.1e}, "
                                 f"{speed:,.0f} tokens/s", refresh=False)


def check_blamed(blamed: list[list[str]], step: int) -> None:
    """Raise InputError, on all ranks, after ten skipped steps in a row; blamed: this rank's suspects of each."""
    if len(blamed) < 10:
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, blamed)
    keys = dict.fromkeys(key for mine in everyone for step_keys in mine for key in step_keys)
    raise InputError(f"ten steps in a row, up to {step}, had a loss or gradient that is not finite: lower --lr, or "
                     f"look at these samples: {', '.join([*keys][:100])}" + ", ..." * (len(keys) > 100))


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl in the order of their steps; of steps that were done twice the last counts."""
    rows: dict = {}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "resumed" in row:
                rows = {key: old for key, old in rows.items() if key[0] < row["resumed"]}
            else:
                rows[row["step"], "held_out_loss" in row] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a log.jsonl ({error})") from None
    return list(rows.values())


def plot(paths: list[Path], out: Path) -> None:
    """Draw loss (held-out ones dashed) and throughput of log.jsonl files, or of those in runs' folders, into a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs `pip install matplotlib`") from None
    logs = [log for path in paths for log in (sorted(path.glob("**/*log.jsonl")) if path.is_dir() else [path])]
    if not logs:
        raise InputError(f"--plot {' '.join(map(str, paths))}: no log.jsonl there")
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1)
    for log in logs:
        rows = read_log(log)
        steps = [row for row in rows if {"loss", "tokens_per_s"} <= row.keys()]
        [line] = loss.plot([r["step"] for r in steps], [math.nan if r["loss"] is None else r["loss"] for r in steps],
                           linewidth=0.8, label=str(log.parent if log.name == "log.jsonl" else log))
        held_out = [row for row in rows if "held_out_loss" in row]
        loss.plot([r["step"] for r in held_out], [r["held_out_loss"] for r in held_out], "o--", color=line.get_color())
        speed.plot([r["step"] for r in steps], [r["tokens_per_s"] for r in steps], linewidth=0.8)
    loss.set(ylabel="loss, nats a token (dashed: held out)", yscale="log")
    speed.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    loss.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)
    print(f"{len(logs)} logs drawn in {out}")
