"""log.jsonl, a line per step: written while training, and read again. paper/curves.py draws it."""
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plumbing.settings import InputError

# Peak FLOP/s in dense bf16, by a part of the device's name; the first that fits counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
         "A100": 312e12, "L40S": 362e12}
BAD_STEPS = 10          # so many skipped steps in a row end the training
SHOWN_KEYS = 100        # of the samples that they had


def mfu(flops_per_s: float, device: torch.device) -> float | str:
    """Model FLOP/s of one device as a share of its peak; "unknown" where that is."""
    if device.type != "cuda":
        return "unknown"
    name = torch.cuda.get_device_name(device)
    for part, peak in PEAKS.items():
        if re.search(rf"{part}(?!\d)", name):       # no A1000
            return flops_per_s / peak
    return "unknown"


def peak_memory(device: torch.device) -> int | str:
    """The most bytes that this process has had: of the device, or of a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return "unknown"
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_log(path: Path) -> TextIO:
    """log.jsonl, to be continued, a line at once. Changes the file: a line that a kill has cut off
    goes."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


@dataclass
class Step:
    """A step that was taken and is not judged yet."""
    row: dict                           # of its line: step, epoch, lr, bad
    counts: Counter                     # train.match_ranks's
    keys: list[list[str]]               # its samples' names, row by row
    numbers: Tensor | None              # train.take_step's: loss, gradient's norm, this rank's rows
    sent: torch.cuda.Event | None       # after it the numbers are there


class StepLog:
    """The first rank's log.jsonl and its bar: a line per step, per resumption and per evaluation.

    A step is judged and logged when its numbers are there: a GPU sends them while the host is busy
    with the next step. All ranks judge, from the same loss and norm; only the first one's log is a
    file.

    Attributes: skipped, the steps so far whose loss or gradient was not finite, and bad_in_a_row,
    how many of them came last. Both are of the steps that were judged.
    """

    def __init__(self, path: Path, stage: int, step: int, n_steps: int, skipped: int,
                 device: torch.device, flops: Callable[[Counter], float]):
        """step: the next one, of n_steps. skipped: steps before it that were. flops: of a step,
        from its counts."""
        self.stage, self.device, self.flops = stage, device, flops
        self.skipped = skipped
        self.suspects: list[list[str]] = []     # samples of each step since the last good one
        self.under_way: Step | None = None
        main_rank = dist.get_rank() == 0
        self.file = open_log(path if main_rank else Path(os.devnull))
        self.bar = tqdm(desc=f"stage {stage}", total=n_steps, initial=step, disable=not main_rank,
                        mininterval=1)
        self.start = time.perf_counter()
        if self.file.tell():
            self.write(resumed=step, processes=dist.get_world_size())

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.file.close()

    @property
    def bad_in_a_row(self) -> int:
        return len(self.suspects)

    def write(self, **row) -> None:
        """Add a line. The next step's time begins after it."""
        self.file.write(json.dumps({"stage": self.stage, **row}) + "\n")
        self.start = time.perf_counter()

    def add(self, step: Step) -> None:
        """Take a step on. Judges and logs the one before it, and on a CPU this one too. Raises
        InputError."""
        self.settle()
        self.under_way = step
        if step.sent is None:
            self.settle()

    def settle(self) -> int:
        """Judge and log the step that is under way, if any: waits for its numbers, counts it in
        `skipped` if it was, and returns that. Raises InputError, on all ranks, after ten skipped
        steps in a row."""
        step, self.under_way = self.under_way, None
        if step is None:
            return self.skipped
        if step.sent:
            step.sent.synchronize()
        now = time.perf_counter()
        loss, norm, *row_losses = [None, None] if step.numbers is None else step.numbers.tolist()
        if loss is None or math.isfinite(loss) and math.isfinite(norm):
            self.suspects.clear()
        else:
            self.skipped += 1
            self.suspects.append(suspects_of(step.keys, row_losses))
            loss, norm = None, None
        if self.bad_in_a_row >= BAD_STEPS:
            raise diverged(self.suspects, step.row["step"])
        self.write_step(step, loss, norm, now - self.start)
        self.start = now
        return self.skipped

    def write_step(self, step: Step, loss: float | None, norm: float | None,
                   seconds: float) -> None:
        """The line and the bar of a step that took so long."""
        counts = step.counts
        tokens_per_s = counts["tokens"] / seconds
        flops_per_s = self.flops(counts) / seconds
        self.write(**step.row, loss=loss, grad_norm=norm, tokens_per_s=tokens_per_s,
                   images_per_s=counts["images"] / seconds,
                   padding=counts["blank"] / max(1, counts["tokens"] + counts["blank"]),
                   peak_memory=peak_memory(self.device), flops_per_s=flops_per_s,
                   mfu=mfu(flops_per_s / dist.get_world_size(), self.device), skipped=self.skipped)
        self.bar.update()
        shown = "unknown" if loss is None else f"{loss:.3f}"
        numbers = f"loss {shown}, lr {step.row['lr']:.1e}, {tokens_per_s:,.0f} tokens/s"
        self.bar.set_postfix_str(numbers, refresh=False)


def suspects_of(keys: list[list[str]], row_losses: list[float]) -> list[str]:
    """The samples of the rows whose loss is not finite; if there are none, of all rows."""
    suspects = []
    for row_keys, loss in zip(keys, row_losses):
        if not math.isfinite(loss):
            suspects += row_keys
    return suspects or [key for row_keys in keys for key in row_keys]


def diverged(suspects: list[list[str]], step: int) -> InputError:
    """The error after too many skipped steps in a row, up to `step`. suspects: this rank's samples,
    for each of the steps. Every rank calls this."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, suspects)
    keys = list(dict.fromkeys(key for mine in everyone for step_keys in mine for key in step_keys))
    more = ", ..." if len(keys) > SHOWN_KEYS else ""
    return InputError(f"ten steps in a row, up to {step}, had a loss or gradient that is not "
                      "finite: lower --lr, or look at these samples: "
                      f"{', '.join(keys[:SHOWN_KEYS])}{more}")


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl in the order of their steps; of steps that were done twice the last
    counts. Raises InputError."""
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
