"""log.jsonl, a line per step: written while training, read again, drawn."""
import json
import math
import os
from pathlib import Path

from plumbing.weights import InputError


def open_log(path: Path):
    """log.jsonl, to be continued, a line at once; one that a kill has cut off is taken away."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


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
    logs = [log for path in paths for log in (sorted(path.glob("**/log.jsonl")) if path.is_dir() else [path])]
    if not logs:
        raise InputError(f"--plot {' '.join(map(str, paths))}: no log.jsonl there")
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1)
    for log in logs:
        rows = read_log(log)
        steps = [row for row in rows if "loss" in row]
        [line] = loss.plot([r["step"] for r in steps], [math.nan if r["loss"] is None else r["loss"] for r in steps],
                           linewidth=0.8, label=str(log.parent))
        held_out = [row for row in rows if "held_out_loss" in row]
        loss.plot([r["step"] for r in held_out], [r["held_out_loss"] for r in held_out], "o--", color=line.get_color())
        speed.plot([r["step"] for r in steps], [r["tokens_per_s"] for r in steps], linewidth=0.8)
    loss.set(ylabel="loss, nats a token (dashed: held out)", yscale="log")
    speed.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    loss.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"{len(logs)} logs drawn in {out}")
