"""The paper's tables with a row of ours, as markdown.

The paper's figures are from Table 1 (ALIGN of the three sizes), Table 2 (the connectors on
Llama-3.2-3B) and Table 3 (noise) of arXiv 2502.01341, first version. Of VCR that one has the gains
(section 5.4); the scores, which give the same, and the cosine distances are the second version's.
"""
import json
import math
from pathlib import Path

from paper.benchmarks import OURS
from paper.metrics import METRICS
from paper.predictions import read_predictions
from plumbing.files import refuse_inputs, write_text
from plumbing.settings import InputError, read_json

COLUMNS = {
    "DocVQA": "DocVQA val",
    "InfoVQA": "InfoVQA val",
    "DeepForm": "DeepForm test",
    "KLC": "KLC test",
    "WTQ": "WTQ test",
    "TabFact": "TabFact test",
    "ChartQA": "ChartQA test",
    "TextVQA": "TextVQA val",
    "TableVQABench": "TableVQA test",
}
# The nine scores in %, then the paper's own average of them. The last three are Table 2's.
TABLE_1 = {
    "ALIGN, Llama-3.2-1B":
        [72.42, 38.16, 60.47, 33.71, 28.66, 71.31, 65.44, 48.81, 50.29, 52.14],
    "ALIGN, Llama-3.2-3B":
        [79.63, 44.53, 63.49, 35.25, 38.59, 78.51, 71.88, 57.38, 60.10, 58.81],
    "ALIGN, Llama-3.1-8B":
        [81.18, 53.75, 63.25, 35.50, 45.31, 83.04, 75.00, 64.60, 64.33, 62.88],
    "MLP, Llama-3.2-3B":
        [71.46, 37.56, 62.07, 33.36, 28.94, 73.22, 66.48, 53.56, 50.96, 53.06],
    "Perceiver, Llama-3.2-3B":
        [69.08, 34.13, 57.08, 31.75, 27.95, 71.93, 65.16, 51.33, 47.76, 50.68],
    "Ovis, Llama-3.2-3B":
        [74.68, 42.11, 58.02, 33.50, 33.13, 76.67, 67.92, 52.60, 53.93, 54.72],
}
# Exact match, easy and hard, second version; the first has the gains, 14.41 and 10.18.
VCR = {"ALIGN, Llama-3.2-3B": [65.84, 48.07], "MLP, Llama-3.2-3B": [51.43, 37.89]}
# The average of the nine without and with noise, and the cosine distance.
TABLE_3 = {"ALIGN, Llama-3.2-3B": [58.81, 57.14, 0.0036],
           "MLP, Llama-3.2-3B": [53.06, 27.52, 0.3938]}


def markdown(header: list[str], rows: list[list]) -> str:
    """A table. Numbers have two decimals, None is a dash."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, rule]
    for row in rows:
        lines.append([cell_text(cell) for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell_text(cell: str | float | None) -> str:
    if cell is None or cell != cell:        # nan: not measured
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.2f}"


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def score_tables(scores: dict[str, float], model: str) -> str:
    """Headline scores in % by benchmark -> Tables 1 and 2 in one, then what else was measured.

    nan counts as not measured: TableVQABench scores it while one of its splits has no rows.
    """
    scores = {name: value for name, value in scores.items() if not math.isnan(value)}
    ours = f"**{model}**"
    tables = []
    if any(name in scores for name in COLUMNS):
        tables.append(table_1(scores, ours))
    vcr = [scores.get("VCR-easy"), scores.get("VCR-hard")]
    if vcr != [None, None]:
        rows = [[name, *values] for name, values in VCR.items()]
        header = ["Model", "VCR easy, exact match", "VCR hard, exact match"]
        tables.append(markdown(header, [*rows, [ours, *vcr]]))
    drawn = [name for name in OURS if name in scores]
    if drawn:
        row = [ours, *(scores[name] for name in drawn)]
        tables.append(markdown(["Model", *drawn], [row]))
    return "\n".join(tables)


def table_1(scores: dict[str, float], ours: str) -> str:
    """The paper's rows and ours.

    A last column averages every row over the columns that were measured here; the average of nine
    is of nine only.
    """
    nine = [scores.get(name) for name in COLUMNS]
    measured = [i for i, value in enumerate(nine) if value is not None]
    rows = []
    for name, values in TABLE_1.items():
        rows.append([name, *values, mean([values[i] for i in measured])])
    average = mean(nine) if len(measured) == len(nine) else None
    rows.append([ours, *nine, average, mean([nine[i] for i in measured])])
    header = ["Model", *COLUMNS.values(), "average", f"average of {len(measured)} measured"]
    return markdown(header, rows)


def interval_table(results: dict) -> str:
    """Every score of every benchmark (%), of how many samples, and between which numbers it lies.

    The interval is that of drawing the benchmark's samples anew: 95 of 100 such scores lie in it.
    Empty without scores.
    """
    rows = []
    for name, scores in results["scores"].items():
        intervals = results["intervals"][name]
        for score, value in scores.items():
            if not math.isnan(value):
                n = results["samples"].get(name, {}).get(score)     # none in an older scores.json
                rows.append([f"{name} {score}", 100 * value, span(intervals[score]),
                             None if n is None else f"{n:,}"])
    header = ["Score, %", f"**{results['model']}**", "95 % interval", "samples"]
    return markdown(header, rows) if rows else ""


def span(interval: list[float]) -> str:
    """[0.7, 0.75] -> "70.00 to 75.00"; a dash for what was not measured."""
    low, high = interval
    if math.isnan(low):
        return "-"
    return f"{100 * low:.2f} to {100 * high:.2f}"


def noise_table(noise: dict[str, list[dict]], scores: dict[str, float], model: str) -> str:
    """Table 3: for each benchmark and sigma the score (%) without and with noise; for each sigma
    that all of Table 1's benchmarks here have, also their average.

    Beside it their difference, and how much the noise is for F and for the connector.
    noise: by benchmark, dicts of sigma, std_F, cosine_distance, score (%), and interval (0 to 1).
    """
    header = ["Model", "benchmark", "sigma", "std(F)", "sigma / std(F)", "without noise",
              "with noise", "95 % interval", "drop", "cosine distance"]
    rows = []
    for name, (clean, noisy, distance) in TABLE_3.items():
        rows.append([name, "average of nine", "3", None, None, clean, noisy, None, clean - noisy,
                     f"{distance:.4f}"])
    for name, runs in noise.items():
        for run in sorted(runs, key=lambda run: run["sigma"]):
            sigma, std = run["sigma"], run["std_F"]
            relative = f"{sigma / std:.3g}" if std else None
            rows.append([f"**{model}**", name, f"{sigma:.3g}", f"{std:.3g}", relative,
                         scores[name], run["score"], span(run["interval"]),
                         scores[name] - run["score"],
                         f"{run['cosine_distance']:.4f}"])
    rows += [[f"**{model}**", *row] for row in noise_averages(noise, scores)]
    return markdown(header, rows)


def noise_averages(noise: dict[str, list[dict]], scores: dict[str, float]) -> list[list]:
    """noise_table's rows, without the model, of the averages over several benchmarks of Table 1."""
    names = [name for name in COLUMNS if name in noise]
    runs = [{run["sigma"]: run for run in noise[name]} for name in names]
    if len(names) < 2:
        return []
    clean = mean([scores[name] for name in names])
    rows = []
    for sigma in sorted(set.intersection(*map(set, runs))):
        noisy = mean([of_name[sigma]["score"] for of_name in runs])
        distance = mean([of_name[sigma]["cosine_distance"] for of_name in runs])
        rows.append([f"average of {len(names)}", f"{sigma:.3g}", None, None, clean, noisy, None,
                     clean - noisy, f"{distance:.4f}"])
    return rows


def headline(scores: dict[str, float]) -> float:
    """A benchmark's first score, the one in the tables, in %."""
    return 100 * next(iter(scores.values()))


def show(results: dict, out: Path | None) -> None:
    """Print the tables, and write them and all scores to OUT/table.md and OUT/scores.json."""
    scores = {name: headline(of_name) for name, of_name in results["scores"].items()}
    text = score_tables(scores, results["model"]) + "\n" + interval_table(results)
    if results["noise"]:
        text += "\n" + noise_table(results["noise"], scores, results["model"])
    for name, of_name in results["scores"].items():
        intervals = results["intervals"][name]
        values = " ".join(score_text(key, value, intervals[key])
                          for key, value in of_name.items() if not math.isnan(value))
        print(f"{name}: {values}")
    print("\n" + text, end="")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        # In this order: a table without scores beside it is somebody else's.
        write_text(out / "scores.json", json.dumps(without_nan(results), indent=2) + "\n")
        write_text(out / "table.md", text)


def without_nan(value):
    """nan, which JSON does not have, becomes None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value


def with_nan(value):
    """without_nan undone."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def refuse_foreign_table(out: Path) -> None:
    """Raise InputError if a table.md is there that `show` has not written."""
    if (out / "table.md").exists() and not (out / "scores.json").exists():
        raise InputError(f"{out / 'table.md'}: without a scores.json it is not from eval.py: move "
                         "it, or take another --out")


def refuse_foreign_scores(out: Path) -> None:
    """Raise InputError if a table.md or scores.json is there that --score has not written."""
    refuse_foreign_table(out)
    path = out / "scores.json"
    if path.exists():
        before = with_nan(read_json(path))
        if "weights" in before:
            raise InputError(f"{path}: a model's own scores: take another --out")
        check_scores(before, path)


def score_text(name: str, score: float, interval: list[float]) -> str:
    low, high = interval
    return f"{name}={score:.4f} [{low:.4f}, {high:.4f}]"


def check_scores(results: dict, path: Path) -> None:
    """Raise InputError unless a scores.json is as `show` writes it."""
    scores, intervals, noise = (results.get(key) for key in ("scores", "intervals", "noise"))
    samples = results.get("samples", {})
    if (not isinstance(scores, dict) or not all(map(is_scores, scores.values()))
            or not isinstance(intervals, dict) or intervals.keys() != scores.keys()
            or not all(are_intervals(intervals[name], scores[name]) for name in scores)
            or not isinstance(samples, dict) or not all(map(is_counts, samples.values()))
            or not isinstance(noise, dict) or not all(map(are_noise_runs, noise.values()))
            or not noise.keys() <= scores.keys()):
        raise InputError(f"{path}: not as eval.py writes it: delete it, or take another --out")


def is_number(value) -> bool:
    return isinstance(value, (int, float))


def is_counts(value) -> bool:
    return isinstance(value, dict) and all(type(n) is int for n in value.values())


def is_scores(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_number, value.values()))


def are_intervals(value, scores: dict[str, float]) -> bool:
    """One for each score."""
    is_dict = isinstance(value, dict) and value.keys() == scores.keys()
    return is_dict and all(map(is_interval, value.values()))


def is_interval(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def are_noise_runs(value) -> bool:
    keys = "sigma", "std_F", "cosine_distance", "score"
    return isinstance(value, list) and all(
        isinstance(run, dict) and all(is_number(run.get(key)) for key in keys)
        and is_interval(run.get("interval")) for run in value)


def benchmark_file(spec: str) -> tuple[str, Path]:
    """BENCHMARK.jsonl, or BENCHMARK=FILE -> benchmark and file. Raises InputError."""
    name, path = "", spec
    if not Path(spec).exists():
        before, equals, after = spec.partition("=")
        name, path = (before, after) if equals else ("", spec)
    name = name or Path(path).name.split(".")[0]
    if name not in METRICS:
        raise InputError(f"{spec}: no benchmark {name}: say NAME={path}, with one of "
                         f"{', '.join(METRICS)}")
    return name, Path(path)


def score_files(specs: list[str], out: Path | None) -> None:
    """--score: files of predictions, called BENCHMARK.jsonl or given as BENCHMARK=FILE."""
    results = {"model": "these predictions", "scores": {}, "intervals": {}, "samples": {},
               "noise": {}}
    files = [benchmark_file(spec) for spec in specs]
    if out:
        for written in ("table.md", "scores.json"):
            refuse_inputs(out / written, [path for _, path in files])
        refuse_foreign_scores(out)
    for spec, (name, path) in zip(specs, files):
        if name in results["scores"]:
            raise InputError(f"{spec}: a second file for {name}: score one at a time")
        rows = read_predictions(path)
        try:
            results["scores"][name] = METRICS[name](rows)
        except KeyError as error:
            raise InputError(f"{path}: a row's split is {error}, which {name} does not have"
                             ) from None
        results["intervals"][name] = METRICS[name].intervals(rows)
        results["samples"][name] = METRICS[name].samples(rows)
    show(results, out)
