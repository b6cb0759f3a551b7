"""How sure scores are, and two models sample by sample: intervals of metrics.py, compare.py."""
import itertools
import json
import math
import random

import numpy as np
import pytest

import paper.compare
from benchmark_cases import cases
from commands import run
from data import READ
from paper.benchmarks import READERS
from paper.compare import compare, report
from paper.metrics import METRICS, PAGE_KINDS, RESAMPLES, middle
from plumbing.settings import InputError


def row(i, prediction, gold="yes", **more):
    return {"index": i, "question": "q", "answers": [gold], "split": None,
            "prediction": prediction, **more}


def of_right(n, right):
    """n rows of TabFact, of which the first `right` are right."""
    return [row(i, "yes" if i < right else "no") for i in range(n)]


@pytest.mark.parametrize("n, right", [(100, 50), (400, 300), (5000, 4000), (60, 6)])
def test_an_interval_of_a_share_is_that_of_the_binomial(n, right):
    """Near p +- 1.96 sqrt(p (1 - p) / n), and the same every time."""
    rows = of_right(n, right)
    low, high = METRICS["TabFact"].intervals(rows)["accuracy"]
    p = right / n
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=0.25 * half)
    assert high == pytest.approx(p + half, abs=0.25 * half)
    assert METRICS["TabFact"].intervals(rows)["accuracy"] == [low, high]


@pytest.mark.parametrize("n, end", [(1, 0.975), (30, 0.116), (1000, 0.0037)])
def test_nothing_wrong_is_no_certainty(n, end):
    """30 of 30 right: a model that is right in 88.4 % of all cases does that once in 40 times."""
    right, wrong = METRICS["TabFact"].intervals(of_right(n, n)), METRICS["KLC"].intervals(
        of_right(n, 0))
    assert right["accuracy"] == pytest.approx([1 - end, 1], abs=5e-4)
    assert wrong["f1"] == pytest.approx([0, end], abs=5e-4)
    chart = [{**r, "split": "human"} for r in of_right(n, n)] + [row(n, "no", split="augmented")]
    assert METRICS["ChartQA"].intervals(chart)["human"] == pytest.approx([1 - end, 1], abs=5e-4)
    samples = METRICS["ChartQA"].samples(chart)
    assert samples["human"] == n and samples["augmented"] == 1


@pytest.mark.parametrize("benchmark", METRICS)
def test_every_score_of_every_benchmark_has_an_interval_around_it(benchmark):
    name = benchmark if not benchmark.startswith(("toy", "reader")) else "TextVQA"
    rows = cases(name)
    if benchmark in READERS:            # each kind is read aloud, and asked about
        kinds = itertools.cycle(PAGE_KINDS)
        asks = itertools.cycle([READ] * len(PAGE_KINDS) + ["what?"] * len(PAGE_KINDS))
        rows = [{**row, "split": next(kinds), "question": next(asks)} for row in rows]
    scores, intervals = METRICS[benchmark](rows), METRICS[benchmark].intervals(rows)
    assert scores.keys() == intervals.keys()
    for score, (low, high) in intervals.items():
        assert low <= scores[score] <= high, score
        assert 0 <= low and high - low > 0.01
        assert high <= 1 or "errors" in score       # too long a reading has more than all wrong
    none = METRICS[benchmark].intervals([])
    assert none.keys() == scores.keys() and all(map(math.isnan, sum(none.values(), [])))


def test_the_bootstrap_is_the_metric_of_drawn_rows():
    """The naive way, slowly: draw rows, score them, for a metric that is no mean over rows."""
    rows = cases("TableVQABench")
    metric = METRICS["TableVQABench"]
    [drawn] = metric.drawn(rows, metric.counted(rows))
    generator = np.random.default_rng(0)
    for draw in range(20):
        picked = [rows[i] for i in generator.integers(len(rows), size=len(rows))]
        naive = metric(picked)
        assert {name: values[draw] for name, values in drawn.items()} == pytest.approx(naive)
    assert all(values.shape == (RESAMPLES,) for values in drawn.values())


def test_the_middle_has_95_of_100_draws():
    draws = np.random.default_rng(0).permutation(np.arange(2001.0))
    assert middle(np.append(draws, math.nan)) == [50, 1950]


def test_f1_is_drawn_by_document():
    """Ten rows of a document agree: there are 40 samples, not 400, so it is wider by sqrt(10)."""
    rows = [row(i, "yes" if i // 10 % 2 else "no", document=f"page {i // 10}") for i in range(400)]
    alone = [{**r, "document": None} for r in rows]
    widths = [np.diff(METRICS["KLC"].intervals(some)["f1"])[0] for some in (rows, alone)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.2)
    widths = [np.diff(METRICS["WTQ"].intervals(some)["accuracy"])[0] for some in (rows, alone)]
    assert widths[0] == widths[1]


def test_a_paired_difference_is_surer_than_two_scores():
    """B has what A has and 20 more: each alone is +- 4.4 points, their difference +- 1.3."""
    a, b = of_right(500, 250), of_right(500, 270)
    found = compare(METRICS["TabFact"], a, b)
    [(name, score_a, score_b, difference, (low, high))] = found.table
    assert (name, score_a, score_b) == ("accuracy", 50.0, 54.0)
    assert difference == pytest.approx(-4) and -6 < low < -5 and -3 < high < -2
    assert ((found.scores_a == 1) & (found.scores_b == 0)).sum() == 0
    assert ((found.scores_a == 0) & (found.scores_b == 1)).sum() == 20


def test_two_alike_models_do_not_differ():
    rng = random.Random(0)
    outside = 0
    for _ in range(40):
        a = [row(i, rng.choice(["yes", "no"])) for i in range(200)]
        b = [row(i, rng.choice(["yes", "no"])) for i in range(200)]
        low, high = compare(METRICS["TabFact"], a, b).table[0][-1]
        outside += not low <= 0 <= high
    assert outside <= 6         # 2 expected


@pytest.mark.parametrize("benchmark", [
    "DocVQA", "ChartQA", "TableVQABench", "VCR-easy", "TextVQA", "WTQ", "DeepForm", "KLC"])
def test_a_samples_score_is_that_of_the_sample_alone(benchmark):
    metric = METRICS[benchmark]
    rows = cases(benchmark)[:50]
    for r, score in zip(rows, metric.of_rows(metric.counted(rows))):
        scores = metric([r])
        alone = scores[r["split"]] if benchmark == "TableVQABench" else next(iter(scores.values()))
        said = {text.strip() for text in (r["prediction"], *r["answers"])}
        is_none = benchmark in ("DeepForm", "KLC") and said == {"None"}
        assert score == (1 if is_none else alone)


def test_a_page_that_is_read_well_is_ahead_of_one_that_is_not():
    """Of the reader's two headlines one counts errors: fewer are better."""
    read = {"question": READ, "split": "letter"}
    asked = {"question": "who?", "split": "letter"}
    a = [row(0, "hello  world", "hello\nworld", **read), row(1, "x" * 40, "hello world", **read),
         row(2, "hello", "hallo", **asked)]
    b = [row(0, "hallo world", "hello\nworld", **read),
         row(1, "hello world", "hello world", **read), row(2, "hallo", "hallo", **asked)]
    found = compare(METRICS["reader-pages"], a, b)
    assert found.scores_a.tolist() == [1, 0, 0]
    assert found.scores_b.tolist() == [pytest.approx(10 / 11), 1, 1]


def test_a_page_that_is_half_read_is_right_and_the_better_read_one_higher():
    """Of eight letters A reads 4, 3 and 7, B all, 4 and none."""
    read = {"gold": "abcdefgh", "question": READ, "split": "letter"}
    a, b = ([row(i, "abcdefgh"[:n], **read) for i, n in enumerate(letters)]
            for letters in ([4, 3, 7], [8, 4, 0]))
    said = report("reader-pages", ["a", "b"], compare(METRICS["reader-pages"], a, b))
    assert said.endswith("right: both 1, only A 1, only B 1, neither 0\nhigher: A 1, B 2\n")


def test_a_value_that_is_rightly_none_is_ahead_of_one_that_was_made_up():
    a, b = [row(0, "None", "None"), row(1, "yes")], [row(0, "zz", "None"), row(1, "None")]
    found = compare(METRICS["DeepForm"], a, b)
    assert found.scores_a.tolist() == [1, 1] and found.scores_b.tolist() == [0, 0]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command(tmp_path):
    """A has 3, 4, 5 right, B 4, 5, 6, 7; row 9 is in A alone."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = write(tmp_path / "a" / "TabFact.jsonl",
              [row(i, "yes" if i in (3, 4, 5) else "no") for i in range(10)])
    b = write(tmp_path / "b" / "other.jsonl",
              [row(i, "yes" if i in (4, 5, 6, 7) else "no") for i in reversed(range(9))])
    out = tmp_path / "apart.jsonl"
    done = run("-m", "paper.compare", a, b, "--out", out)
    assert "1 samples are in A alone and 0 in B alone" in done.stdout
    assert "| accuracy | 33.33 | 44.44 | -11.11 |" in done.stdout
    assert "right: both 2, only A 1, only B 2, neither 4\n" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], line["A"], line["B"]) for line in lines] == [
        (3, "yes", "no"), (6, "no", "yes"), (7, "no", "yes")]


def test_files_that_do_not_compare_are_one_line(tmp_path):
    a = write(tmp_path / "TabFact.jsonl", of_right(3, 1))
    paths = {"another question": [row(0, "yes", question="r")], "no sample": [row(7, "yes")]}
    for says, rows in paths.items():
        b = write(tmp_path / "b.jsonl", rows)
        with pytest.raises(InputError, match=says):
            paper.compare.common_samples([a, b])
    with pytest.raises(InputError, match="the same index"):
        paper.compare.common_samples([a, write(tmp_path / "twice.jsonl", of_right(2, 1) * 2)])
