"""plumbing/streams.py: the order of samples whoever reads them and wherever they stop, and what large sets cost."""
import itertools
import json
import shutil
import tarfile
import time
from dataclasses import asdict

import numpy as np
import pytest
from torch.utils.data import DataLoader

from conftest import ROOT, alone, run
from plumbing import streams
from plumbing.streams import Position, deal, steps_of
from sets import N, PAGES, PEAK, add_sample, no_hang, texts, tokenizer, write_texts


# ---------------------------------------------------------------------------------------------------------------------
# Order


@pytest.fixture
def small_groups(monkeypatch):
    """Shards of a few lines and groups of a few shards, so that both borders matter."""
    monkeypatch.setattr(streams, "BLOCK", 400)
    monkeypatch.setattr(streams, "GROUP", 15)


def steps(documents, world=1, workers=0, batch_size=10, position=None, n=None):
    """(keys in the order in which they are dealt, Position after them) of n steps, or to the end of the epoch."""
    position = position or Position()

    def of(rank):
        shares = []
        for share in steps_of(DataLoader(documents, batch_size=None, num_workers=workers,
                                         sampler=deal(documents.draws(position), batch_size, rank, world))):
            shares.append(share)
            if len(shares) == n or n is None and share[1].epoch > position.epoch:
                return shares

    done = []       # rank by rank: workers that were forked while another rank's thread read ahead have hung, once
    for shares in zip(*map(of, range(world)), strict=True):
        assert all(p == shares[0][1] for _, p in shares), "the ranks are not at the same place"
        keys = [s.key for together in itertools.zip_longest(*(samples for samples, _ in shares)) for s in together if s]
        done.append((keys, shares[0][1]))
    return done


@pytest.mark.parametrize("n", [103, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_sample_comes_once_an_epoch(small_groups, tmp_path, tokenizer, world, n):
    """For any number of ranks and workers the same steps; the last one of an epoch is short, if it has to be."""
    for i in range(3):
        write_texts(tmp_path, f"part{i}", n // 3 + (i < n % 3))
    documents = texts(tmp_path, tokenizer)
    alone = steps(documents)
    assert [len(keys) for keys, _ in alone] == [10] * (n // 10) + [n % 10] * (n % 10 > 0)
    assert len({key for keys, _ in alone for key in keys}) == n
    for workers in (0, 1, 2):
        assert steps(documents, world, workers) == alone


def test_epochs_and_seeds_have_orders_of_their_own(small_groups, tmp_path, tokenizer):
    write_texts(tmp_path, "a", 50)
    runs = [[key for keys, _ in steps(texts(tmp_path, tokenizer, seed), n=11, batch_size=9) for key in keys]
            for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second = runs[0][:50], runs[0][50:]
    assert len(set(first)) == 50 and first != second != sorted(second)
    in_file = sorted(first, key=lambda key: int(key.rpartition(":")[2]))
    assert np.mean([abs(in_file.index(key) - i) for i, key in enumerate(first)]) > 10, "groups alone are shuffled"


def restored(position):
    """A Position as a checkpoint brings it back."""
    return Position(**json.loads(json.dumps(asdict(position))))


def test_a_stop_anywhere_changes_nothing(small_groups, tmp_path, tokenizer):
    """Two epochs and more of a mixture, on two ranks; a restart goes on on two or on three."""
    write_texts(tmp_path, "a", 43)
    write_texts(tmp_path, "b", 17)
    documents = texts([f"{tmp_path / 'a.jsonl'}:5", f"{tmp_path / 'b.jsonl'}:1"], tokenizer)
    whole = steps(documents, world=2, n=14, batch_size=8)
    for stop in range(1, 14):
        position = restored(whole[stop - 1][1])
        for world in (2, 3):
            rest = steps(documents, world, position=position, n=14 - stop, batch_size=8)
            assert [keys for keys, _ in rest] == [keys for keys, _ in whole[stop:]], (stop, world)


def test_weights_mix_and_an_epoch_ends_with_the_first_set(small_groups, tmp_path, tokenizer):
    write_texts(tmp_path, "a", 40)
    write_texts(tmp_path, "b", 30)
    documents = texts([f"{tmp_path / 'a.jsonl'}:5", f"{tmp_path / 'b.jsonl'}:1"], tokenizer)
    drawn, epochs = [], []
    for reference, _ in documents.draws(Position()):
        if reference is not None:
            drawn.append(documents[reference].key)
        elif len(epochs := [*epochs, len(drawn)]) == 7:
            break
    assert epochs[0] == 48 and documents.epoch_samples() == pytest.approx(48, rel=0.15)
    for start, end in zip([0, *epochs], epochs):
        from_a = ["a.jsonl" in key for key in drawn[start:end]]
        for i in range(1, len(from_a) + 1):
            assert abs(sum(from_a[:i]) - 5 * i / 6) <= 1
    for name, n in [("a.jsonl", 40), ("b.jsonl", 30)]:      # each set goes on from epoch to epoch until all have come
        keys = [key for key in drawn if name in key]
        assert len(keys) > n and all(len(set(keys[i:i + n])) == len(keys[i:i + n]) for i in range(0, len(keys), n))


# ---------------------------------------------------------------------------------------------------------------------
# Large sets


READER = PEAK + """
import sys, time
start, (root, path) = float(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, root)
import functools
import itertools
import torch
from torch.utils.data import DataLoader
from data import Tokenizer, prepare
from plumbing.streams import Documents, Position, deal, steps_of
from toy.pages import write_toy_tokenizer
from vision import SIGLIP_PRESETS
torch.set_num_threads(1)
write_toy_tokenizer(__import__("pathlib").Path(path).parent / "tokenizer.model")
tokenizer = Tokenizer(__import__("pathlib").Path(path).parent / "tokenizer.model")
documents = Documents([path], 0, functools.partial(
    prepare, tokenizer=tokenizer, config=SIGLIP_PRESETS["toy"], max_text=1024, max_tokens=16384))
documents.epoch_samples()
loader = DataLoader(documents, batch_size=None, sampler=deal(documents.draws(Position()), 64, 0, 1))
samples, _ = next(steps_of(loader))
seconds = time.time() - start
assert len(samples) == 64 and len({s.key for s in samples}) == 64 and all(len(s.tokens) for s in samples)
n = sum(1 for _ in itertools.islice(documents.draws(Position()), 2000))
print(seconds, peak())
"""


def read_in_a_process(path):
    done = run("-c", READER, time.time(), ROOT, path, start=alone)
    seconds, megabytes = map(float, done.stdout.split())
    print(f"{path.name}: first batch after {seconds:.1f} s, {megabytes:.0f} MB")
    return megabytes


def test_a_million_samples_cost_no_memory(tmp_path):
    """And no scan: `pytest -s` shows the seconds from the process's start to its first batch, imports included."""
    line = json.dumps({"messages": [{"role": "user", "content": "what is it?"},
                                    {"role": "assistant", "content": "K7Q2"}]}) + "\n"
    with open(tmp_path / "million.jsonl", "w") as file:
        for _ in range(100):
            file.write(line * 10_000)
    (tmp_path / "thousand.jsonl").write_text(line * 1000)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for i in range(1000):
            add_sample(tar, f"{i:09}", PAGES[i % N][0], PAGES[i % N][1])
    for i in range(1, 1000):
        (tmp_path / "tars" / f"{i:05}.tar").hardlink_to(tmp_path / "tars" / "00000.tar")
    base = read_in_a_process(tmp_path / "thousand.jsonl")
    for large in ("million.jsonl", "tars"):
        assert read_in_a_process(tmp_path / large) < base + 300
    (tmp_path / "million.jsonl").unlink()
    shutil.rmtree(tmp_path / "tars")
