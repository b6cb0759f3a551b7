"""Two models' predictions for one benchmark, sample by sample.

    python -m paper.compare out/a/eval/DocVQA.jsonl out/b/eval/DocVQA.jsonl
    python -m paper.compare DocVQA=a.jsonl b.jsonl --out apart.jsonl

Both scores, their difference with its 95 % interval (the paired bootstrap: every draw takes the
same samples of both), and which of the two has how many right. If the interval holds no 0, the
models differ by more than the choice of samples explains.
"""
import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paper.metrics import METRICS, Metric, middle
from paper.predictions import read_predictions
from paper.tables import benchmark_file, markdown
from plumbing.files import refuse_inputs, write_text
from plumbing.processes import run_main
from plumbing.settings import InputError, a_path

# The score of a sample that counts as right. Most metrics give 0 or 1. A page that is read aloud is
# right if at most half of its characters are wrong.
RIGHT = 0.5


@dataclass
class Comparison:
    """Of samples that both files have: the rows, and what each model scores on them.

    scores_a and scores_b (n,) are of the samples alone, from 0 to 1. table holds, for each of the
    metric's scores, in %: its name, A's, B's, their difference, and the interval [low, high].
    """
    rows_a: list[dict]
    rows_b: list[dict]
    scores_a: np.ndarray
    scores_b: np.ndarray
    table: list[tuple[str, float, float, float, list[float]]]


def compare(metric: Metric, rows_a: list[dict], rows_b: list[dict]) -> Comparison:
    """Compare the predictions of two models on the same samples, in the same order."""
    counts_a, counts_b = metric.counted(rows_a), metric.counted(rows_b)     # (n, k)
    totals_a, totals_b = metric.of_counts(counts_a), metric.of_counts(counts_b)
    drawn_a, drawn_b = metric.drawn(rows_a, counts_a, counts_b)
    table = []
    for name, a in totals_a.items():
        b = totals_b[name]
        interval = [100 * end for end in middle(drawn_a[name] - drawn_b[name])]
        table.append((name, 100 * a, 100 * b, 100 * (a - b), interval))
    return Comparison(rows_a, rows_b, metric.of_rows(counts_a), metric.of_rows(counts_b), table)


def common_samples(paths: list[Path]) -> tuple[list[dict], list[dict]]:
    """The rows that both files have, by index, in the first one's order. Raises InputError."""
    first, second = (read_predictions(path) for path in paths)
    for path, rows in zip(paths, (first, second)):
        if len({str(row.get("index")) for row in rows}) < len(rows):
            raise InputError(f"{path}: two of its rows have the same index, or none has one")
    of_index = {str(row.get("index")): row for row in second}
    rows_a, rows_b = [], []
    for number, row in enumerate(first, 1):
        other = of_index.get(str(row.get("index")))
        if other is None:
            continue
        if any(row[key] != other[key] for key in ("question", "answers", "split")):
            raise InputError(f"{paths[1]}: index {row.get('index')} is another question there than "
                             f"in {paths[0]}, row {number}")
        rows_a.append(row)
        rows_b.append(other)
    if not rows_a:
        raise InputError(f"{paths[1]}: no sample of {paths[0]} is there")
    left = len(first) - len(rows_a), len(second) - len(rows_b)
    if any(left):
        print(f"{left[0]:,} samples are in A alone and {left[1]:,} in B alone: they do not count")
    return rows_a, rows_b


def report(name: str, paths: list[Path], found: Comparison) -> str:
    """What is printed: the table, and which of the two has how many samples right."""
    right_a, right_b = found.scores_a >= RIGHT, found.scores_b >= RIGHT     # (n,)
    groups = {"both": right_a & right_b, "only A": right_a & ~right_b,
              "only B": right_b & ~right_a, "neither": ~right_a & ~right_b}
    right = ", ".join(f"{group} {mask.sum():,}" for group, mask in groups.items())
    higher = (found.scores_a > found.scores_b).sum(), (found.scores_b > found.scores_a).sum()
    rows = [[score, a, b, difference, f"{low:.2f} to {high:.2f}"]
            for score, a, b, difference, (low, high) in found.table if not math.isnan(difference)]
    header = [f"{name}, {len(found.rows_a):,} samples, %", "A", "B", "A - B", "95 % interval"]
    return (f"A: {paths[0]}\nB: {paths[1]}\n\n{markdown(header, rows)}\n"
            f"right: {right}\nhigher: A {higher[0]:,}, B {higher[1]:,}\n")


def apart(found: Comparison) -> str:
    """JSONL of the samples that the two score differently, those first where A is ahead most."""
    difference = found.scores_a - found.scores_b                            # (n,)
    lines = []
    for i in np.argsort(-difference, kind="stable"):
        if difference[i]:
            a, b = found.rows_a[i], found.rows_b[i]
            line = {"index": a.get("index"), "question": a["question"], "answers": a["answers"],
                    "A": a["prediction"], "B": b["prediction"],
                    "score_A": float(found.scores_a[i]), "score_B": float(found.scores_b[i])}
            lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs=2, metavar="[NAME=]FILE", help="predictions of eval.py, of "
                        "the benchmark that the first one's name or NAME says")
    parser.add_argument("--out", type=a_path, help="write the samples that are scored differently "
                        "to this JSONL file")
    args = parser.parse_args()
    name, first = benchmark_file(args.files[0])
    second = Path(args.files[1].removeprefix(f"{name}="))
    if args.out:
        refuse_inputs(args.out, [first, second])
    rows_a, rows_b = common_samples([first, second])
    try:
        found = compare(METRICS[name], rows_a, rows_b)
    except KeyError as error:
        raise InputError(f"{first}: a row's split is {error}, which {name} does not have") from None
    print(report(name, [first, second], found), end="")
    if args.out:
        write_text(args.out, apart(found))


if __name__ == "__main__":
    run_main(main)
