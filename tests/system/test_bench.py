"""bench.py's rows, at the toy's sizes: what they say, and that both sides do the same.

Never how fast they are.
"""
import json
import sys

import pytest

import bench
import conftest  # noqa: F401  (one thread)

KEYS = {"work", "ours_s", "theirs_s", "ratio", "of_ceiling", "extra_gb"}
ROWS = {
    "vision": ["vision-fp32", "vision-bf16"],
    "prefill": ["prefill-fp32", "prefill-bf16"],
    "decode": ["decode-fp32", "decode-bf16", "decode-batch8"],
    "connector": ["connector-729", "connector-7290"],
    "load": ["load"],
    "answer": ["answer-align-vs-mlp"],
    "train": ["train"],
}


def run(monkeypatch, capsys, *options) -> list[str]:
    # The heap of the tests after this one is not its business.
    monkeypatch.setattr(bench, "keep_heap", lambda: None)
    argv = ["bench.py", "--preset", "toy", "--repeats", "1", "--threads", "1", *options]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("work", ROWS)
def test_rows(monkeypatch, capsys, work):
    """alternate() itself refuses two sides whose results differ."""
    rows = [json.loads(line) for line in run(monkeypatch, capsys, work, "--json")]
    assert [row["work"] for row in rows] == ROWS[work]
    for row in rows:
        assert set(row) == KEYS and row["ours_s"] > 0
        assert (row["theirs_s"] is None) == (row["work"] == "connector-7290")
        if row["theirs_s"] is not None:
            assert row["ratio"] == pytest.approx(row["ours_s"] / row["theirs_s"])
        assert (row["of_ceiling"] is None) == (work == "answer")
        assert (row["extra_gb"] is not None) == (work == "connector" and sys.platform == "linux")


def test_the_table_shows_what_is_unknown_as_a_dash(monkeypatch, capsys):
    head, row = run(monkeypatch, capsys, "train", "--alone")
    assert head.split() == list(bench.row("", 1.0, None))
    assert row.split()[0] == "train" and row.split()[2:4] == ["-", "-"]


def test_sides_that_differ_are_refused():
    import torch
    with pytest.raises(AssertionError, match="do not do the same"):
        bench.alternate(lambda: torch.ones(3), lambda: torch.tensor([1.0, 1.0, 0.5]), 1)
