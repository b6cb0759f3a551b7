"""paper/metrics.py and metrics_again.py, which was written apart from it, agree.

On 200 hard predictions per benchmark.
"""
import pytest

from benchmark_cases import N, cases
from metrics_again import SCORES
from paper.metrics import METRICS

FOUR_DECIMALS = 0.5e-4


def headline(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


@pytest.mark.parametrize("name", SCORES)
def test_each_row(name):
    """Row by row, so that a disagreement says what it is about; a mean could hide two."""
    apart = []
    for row in cases(name):
        theirs, ours = headline(METRICS[name]([row])), SCORES[name]([row])["score"]
        if abs(theirs - ours) >= FOUR_DECIMALS:
            apart.append(f"{row['prediction']!r} for {row['answers']!r} ({row['split']}): "
                         f"metrics.py {theirs:.4f}, metrics_again.py {ours:.4f}")
    assert not apart, "\n".join(apart)


@pytest.mark.parametrize("name", SCORES)
def test_200_rows(name):
    rows = cases(name)
    theirs, ours = METRICS[name](rows), SCORES[name](rows)
    assert len(rows) == N == 200
    assert 0.3 < ours["score"] < 0.7, "too many right or wrong to tell two metrics apart"
    assert abs(headline(theirs) - ours["score"]) < FOUR_DECIMALS
    for key in theirs.keys() & ours.keys():     # the splits, and what else both have
        assert abs(theirs[key] - ours[key]) < FOUR_DECIMALS, key
