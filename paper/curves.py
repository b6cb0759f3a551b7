"""Draw the logs of runs: loss, held-out loss and throughput by step; and thin them out.

    python -m paper.curves out/toy                              # into out/toy/plot.png
    python -m paper.curves toy/curve.csv --out out/plot.png     # how toy/stage0 was trained
    python -m paper.curves out/a out/b --csv out/both.csv       # a table of means, instead of logs

RUN is a log.jsonl, a folder with some below it, or a table that --csv has written. Needs
`pip install matplotlib`.
"""
import argparse
import csv
import math
from pathlib import Path

from plumbing.files import is_ours, refuse_inputs, replacing
from plumbing.logs import read_log
from plumbing.processes import run_main
from plumbing.settings import InputError, a_path
from plumbing.texts import in_one_line

COLUMNS = ["step", "loss", "held_out_loss", "lr", "tokens_per_s"]   # of a curve: numbers, or None
POINTS = 200            # that a curve has after thinning


def read_curves(path: Path) -> dict[str, list[dict]]:
    """The curves of a RUN: name -> rows of COLUMNS. Raises InputError."""
    if path.suffix == ".csv":
        return read_table(path)
    curves = {}
    for log in logs_of(path):
        name = in_one_line(str(log.parent if log.name == "log.jsonl" else log))
        curves[name] = [numbers_of(row, log) for row in read_log(log)]
    return curves


def numbers_of(row: dict, path: Path) -> dict:
    """A row's COLUMNS. Raises InputError unless they are numbers, and there is a step."""
    numbers = {column: row.get(column) for column in COLUMNS}
    for column, number in numbers.items():
        is_missing = number is None and column != "step"
        is_number = isinstance(number, float) or isinstance(number, int) and abs(number) < 10 ** 18
        if not (is_missing or is_number):
            raise InputError(f"{path}: a row has {str(number)[:40]} for its {column}")
    return numbers


def logs_of(path: Path) -> list[Path]:
    """The files of a RUN. Raises InputError."""
    logs = [path]
    if path.is_dir():
        logs = sorted([*path.glob("**/log.jsonl"), *path.glob("**/*-log.jsonl")])
    if not logs:
        raise InputError(f"{path}: no log.jsonl there")
    return logs


def read_table(path: Path) -> dict[str, list[dict]]:
    """A table that write_table wrote. Raises InputError."""
    curves: dict[str, list[dict]] = {}
    try:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                row = {column: float(line[column]) if line[column] else None for column in COLUMNS}
                curves.setdefault(line["curve"], []).append(numbers_of(row, path))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of curves ({error})") from None
    return curves


def write_table(curves: dict[str, list[dict]], path: Path) -> None:
    """Curves, thinned, as a CSV: a line a point, with the curve's name before COLUMNS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["curve", *COLUMNS])
        for name, rows in curves.items():
            for row in thinned(rows):
                numbers = {column: "" if row[column] is None else f"{row[column]:.5g}"
                           for column in COLUMNS}
                table.writerow([name, *{**numbers, "step": f"{row['step']:.0f}"}.values()])


def thinned(rows: list[dict], points: int = POINTS) -> list[dict]:
    """A curve of at most so many points: each has the means of as many steps, and its last one's
    number. Rows of held-out losses stay as they are."""
    steps = [row for row in rows if row["held_out_loss"] is None]
    held_out = [row for row in rows if row["held_out_loss"] is not None]
    size = max(1, math.ceil(len(steps) / points))       # steps a point
    means = []
    for first in range(0, len(steps), size):
        some = steps[first:first + size]
        point = {column: mean([row[column] for row in some]) for column in COLUMNS}
        means.append({**point, "step": some[-1]["step"]})
    return sorted(means + held_out, key=lambda row: row["step"])


def mean(numbers: list[float | None]) -> float | None:
    """Of those that are there."""
    there = [n for n in numbers if n is not None]
    return sum(there) / len(there) if there else None


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Draw loss (held-out ones dashed) and throughput into a PNG. Raises InputError."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs `pip install matplotlib`") from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1)
    for axes in (loss, speed):          # twenty, where ten is the default
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, rows in curves.items():
        [line] = loss.plot(*points(rows, "loss"), linewidth=0.8,
                           label=name.replace("$", r"\$"))          # no mathematics
        loss.plot(*points(rows, "held_out_loss"), "o--", color=line.get_color())
        speed.plot(*points(rows, "tokens_per_s"), linewidth=0.8)
    held_out = any(points(rows, "held_out_loss")[0] for rows in curves.values())
    loss.set(ylabel=f"loss, nats a token{' (dashed: held out)' if held_out else ''}", yscale="log")
    speed.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    figure.legend(loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:        # "Software" is what is_ours looks for
        figure.savefig(partial, format="png", dpi=90, metadata={"Software": "AlignVLM"})


def points(rows: list[dict], column: str) -> tuple[list[float], list[float]]:
    """(steps, numbers) of the rows that have one."""
    there = [row for row in rows if row[column] is not None]
    return [row["step"] for row in there], [row[column] for row in there]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paper.curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    result = parser.add_mutually_exclusive_group()
    result.add_argument("--out", type=a_path,
                        help="the picture (default: plot.png in the first RUN, or beside it)")
    result.add_argument("--csv", type=a_path, help="write a table of means instead of a picture")
    args = parser.parse_args()
    first = args.runs[0]
    out = args.csv or args.out or (first if first.is_dir() else first.parent) / "plot.png"
    if not args.csv and not args.out and out.exists() and not is_ours(out):
        raise InputError(f"{out}: is not from this command, or from an older one: delete it, or "
                         "name another with --out")
    refuse_inputs(out, [file for run in args.runs for file in logs_of(run)])
    curves = {}
    for run in args.runs:
        new = read_curves(run)
        if both := curves.keys() & new.keys():
            raise InputError(f"{run}: its curve {min(both)} has the name of an earlier one: rename "
                             "it")
        curves |= new
    if args.csv:
        write_table(curves, args.csv)
    else:
        plot(curves, out)
    print(f"{len(curves)} curves in {out}")


if __name__ == "__main__":
    run_main(main)
