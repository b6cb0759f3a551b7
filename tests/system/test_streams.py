"""plumbing/streams.py: the order of samples whoever reads them and wherever they stop, and what
large sets cost."""
import itertools
import json
import mmap
import shutil
import tarfile
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import ROOT, alone, run
from plumbing import streams
from plumbing.formats import list_spans
from plumbing.settings import InputError
from plumbing.streams import Documents, Position, deal, steps_of
from sets import (N, PAGES, PEAK, add_sample, documents_of, messages, no_hang,  # noqa: F401
                  tokenizer, write_texts)


# --------------------------------------------------------------------------------------------------
# Order


@pytest.fixture
def small_groups(monkeypatch):
    """Shards of a few lines and groups of a few shards, so that both borders matter."""
    monkeypatch.setattr(streams, "BLOCK", 400)
    monkeypatch.setattr(streams, "GROUP", 15)


Steps = list[tuple[list, Position]]


def share_of(rank: int, documents: Documents, world: int, workers: int, batch_size: int,
             position: Position, n: int | None) -> Steps:
    """(samples of this rank, Position after them) of n steps, or to the end of the epoch."""
    order = deal(documents.draws(position), batch_size, rank, world)
    loader = DataLoader(documents, batch_size=None, num_workers=workers, sampler=order)
    share = []
    for samples, reached in steps_of(loader):
        share.append((samples, reached))
        if len(share) == n or n is None and reached.epoch > position.epoch:
            return share


def steps(documents: Documents, world=1, workers=0, batch_size=10, position=None, n=None) -> Steps:
    """(keys in the order in which they are dealt, Position after them) of n steps, or to the end of
    the epoch."""
    position = position or Position()
    # Rank by rank: workers that were forked while another rank's thread read ahead have hung, once.
    shares = [share_of(rank, documents, world, workers, batch_size, position, n)
              for rank in range(world)]
    done = []
    for of_all_ranks in zip(*shares, strict=True):
        reached = of_all_ranks[0][1]
        assert all(p == reached for _, p in of_all_ranks), "the ranks are not at the same place"
        turns = itertools.zip_longest(*(samples for samples, _ in of_all_ranks))
        done.append(([s.key for turn in turns for s in turn if s], reached))
    return done


@pytest.mark.parametrize("n", [103, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_sample_comes_once_an_epoch(small_groups, tmp_path, tokenizer, world, n):
    """For any number of ranks and workers the same steps; the last one of an epoch is short, if it
    has to be."""
    for i in range(3):
        write_texts(tmp_path, f"part{i}", n // 3 + (i < n % 3))
    documents = documents_of(tmp_path, tokenizer)
    one_rank = steps(documents)
    rest = [n % 10] if n % 10 else []
    assert [len(keys) for keys, _ in one_rank] == [10] * (n // 10) + rest
    assert len({key for keys, _ in one_rank for key in keys}) == n
    for workers in (0, 1, 2):
        assert steps(documents, world, workers) == one_rank


def test_epochs_and_seeds_have_orders_of_their_own(small_groups, tmp_path, tokenizer):
    write_texts(tmp_path, "a", 50)
    runs = []
    for seed in (0, 0, 1):
        done = steps(documents_of(tmp_path, tokenizer, seed), n=11, batch_size=9)
        runs.append([key for keys, _ in done for key in keys])
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second = runs[0][:50], runs[0][50:]
    assert len(set(first)) == 50 and first != second != sorted(second)
    in_file = sorted(first, key=lambda key: int(key.rpartition(":")[2]))
    moved = [abs(in_file.index(key) - i) for i, key in enumerate(first)]
    assert np.mean(moved) > 10, "groups alone are shuffled"


def test_a_single_shard_too_has_another_order_in_each_epoch(tmp_path, tokenizer):
    write_texts(tmp_path, "a", 50)
    done = steps(documents_of(tmp_path, tokenizer), n=10)
    keys = [key for of_step, _ in done for key in of_step]
    assert sorted(keys[:50]) == sorted(keys[50:]) and len({*keys}) == 50
    assert sum(a == b for a, b in zip(keys[:50], keys[50:])) < 10


def restored(position: Position) -> Position:
    """A Position as a checkpoint brings it back."""
    return Position(**json.loads(json.dumps(asdict(position))))


@pytest.fixture
def mixture(small_groups, tmp_path, tokenizer):
    """mixture(n, m): n samples of weight 5 in a.jsonl, m of weight 1 in b.jsonl."""
    def make(n: int, m: int) -> Documents:
        write_texts(tmp_path, "a", n)
        write_texts(tmp_path, "b", m)
        return documents_of([f"{tmp_path / 'a.jsonl'}:5", f"{tmp_path / 'b.jsonl'}:1"], tokenizer)
    return make


def test_a_stop_anywhere_changes_nothing(mixture):
    """Two epochs and more of a mixture, on two ranks; a restart goes on on two or on three."""
    documents = mixture(43, 17)
    whole = steps(documents, world=2, n=14, batch_size=8)
    for stop in range(1, 14):
        position = restored(whole[stop - 1][1])
        for world in (2, 3):
            rest = steps(documents, world, position=position, n=14 - stop, batch_size=8)
            assert [keys for keys, _ in rest] == [keys for keys, _ in whole[stop:]], (stop, world)


def test_weights_mix_and_an_epoch_ends_with_the_first_set(mixture):
    documents = mixture(40, 30)
    drawn = []          # keys
    epochs = []         # how many were drawn when each ended
    for reference, _ in documents.draws(Position()):
        if reference is not None:
            drawn.append(documents[reference].key)
            continue
        epochs.append(len(drawn))
        if len(epochs) == 7:
            break
    assert epochs[0] == 48 and documents.epoch_samples() == pytest.approx(48, rel=0.15)
    for start, end in zip([0, *epochs], epochs):
        from_a = ["a.jsonl" in key for key in drawn[start:end]]
        for i in range(1, len(from_a) + 1):
            assert abs(sum(from_a[:i]) - 5 * i / 6) <= 1
    # Each set goes on from epoch to epoch until all of it have come.
    for name, n in [("a.jsonl", 40), ("b.jsonl", 30)]:
        keys = [key for key in drawn if name in key]
        rounds = [keys[i:i + n] for i in range(0, len(keys), n)]
        assert len(rounds) > 1 and all(len(set(keys)) == len(keys) for keys in rounds)


@pytest.mark.parametrize("n_sets", [1, 7])
def test_a_shard_is_indexed_once_and_before_it_is_needed(n_sets, small_groups, tmp_path, tokenizer,
                                                         monkeypatch):
    for i in range(n_sets):
        write_texts(tmp_path, f"s{i}", 40)
    documents = documents_of([f"{tmp_path / f's{i}.jsonl'}:1" for i in range(n_sets)], tokenizer)
    indexed, index = [], streams.DataSet.index

    def spy(self, shard: int) -> list:
        indexed.append((threading.current_thread() is threading.main_thread(), id(self), shard))
        return index(self, shard)

    monkeypatch.setattr(streams.DataSet, "index", spy)
    for reference, position in documents.draws(Position()):
        if position.epoch == 1:
            break
    assert not any(in_main for in_main, _, _ in indexed)
    # Each shard once for this epoch. The next group, which is of the next, is under way already.
    times = Counter(indexed)
    assert len(times) == sum(len(data_set.shards) for data_set in documents.sets)
    assert sum(times.values()) < 1.7 * len(times) and max(times.values()) <= 2


def test_an_epoch_is_estimated_from_all_over_the_set(small_groups, tmp_path, tokenizer):
    """Files of very different sizes: the rows of parquet are known, those of others guessed."""
    pq.write_table(pa.table({"a": range(9000)}), tmp_path / "a.parquet")
    for i in range(40):
        pq.write_table(pa.table({"a": range(10)}), tmp_path / f"b{i}.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1, and then nothing")
    assert documents_of(tmp_path, tokenizer).epoch_samples() == 9400
    (tmp_path / "json").mkdir()
    for i in range(30):
        write_texts(tmp_path / "json", f"part{i}", 2 + 5 * (i % 7))
    n = sum(2 + 5 * (i % 7) for i in range(30))
    assert documents_of(tmp_path / "json", tokenizer).epoch_samples() == pytest.approx(n, rel=0.2)


def test_ranks_with_other_files_are_refused_before_the_first_step(tmp_path, tokenizer, monkeypatch):
    """Also where their Positions would be the same for long."""
    for i in range(3):
        write_texts(tmp_path, f"part{i}", 4)
    here = documents_of(tmp_path, tokenizer)
    (tmp_path / "part2.jsonl").unlink()
    there = documents_of(tmp_path, tokenizer)

    def all_reduce(tensor, op):         # with the other rank, whose mark is `theirs`
        tensor.copy_(torch.maximum(tensor, torch.tensor([theirs, -theirs, 0])))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    theirs = here.listing_mark()
    streams.agree_on_files(here)
    for documents in there, here:
        theirs = (here if documents is there else there).listing_mark()
        with pytest.raises(InputError, match="the ranks read different data"):
            streams.agree_on_files(documents)


def test_a_file_that_cannot_be_read_any_more_has_a_place(tmp_path, tokenizer):
    """Its samples are bad ones, and saying so needs nothing from it."""
    write_texts(tmp_path, "part", 3)
    documents = documents_of(tmp_path, tokenizer)
    reference, _ = next(documents.draws(Position()))
    (tmp_path / "part.jsonl").unlink()
    bad = documents[reference]
    assert bad.kind == "unreadable file"
    assert documents.where(bad) == f"{tmp_path / 'part.jsonl'}, byte {reference[2]}"


# --------------------------------------------------------------------------------------------------
# Large sets


READER = PEAK + """
import sys, time
start, (root, path) = float(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, root)
import functools
import itertools
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from data import Tokenizer, prepare
from plumbing.streams import Documents, Position, deal, steps_of
from toy.pages import write_toy_tokenizer
from vision import SIGLIP_PRESETS

torch.set_num_threads(1)
file = Path(path).parent / "tokenizer.model"
write_toy_tokenizer(file)
to_sample = functools.partial(prepare, tokenizer=Tokenizer(file), config=SIGLIP_PRESETS["toy"],
                              max_text=1024, max_tokens=16384)
documents = Documents([path], 0, to_sample)
documents.epoch_samples()
order = deal(documents.draws(Position()), 64, 0, 1)
loader = DataLoader(documents, batch_size=None, sampler=order)
samples, _ = next(steps_of(loader))
seconds = time.time() - start
assert len(samples) == 64 and len({s.key for s in samples}) == 64
assert all(len(s.tokens) for s in samples)
for _ in itertools.islice(documents.draws(Position()), 2000):
    pass
print(seconds, peak())
"""


def read_in_a_process(path: Path) -> float:
    """The MB that it takes to read a data set's first 2,000 places and 64 samples."""
    done = run("-c", READER, time.time(), ROOT, path, start=alone)
    seconds, megabytes = map(float, done.stdout.split())
    print(f"{path.name}: first batch after {seconds:.1f} s, {megabytes:.0f} MB")
    return megabytes


def test_a_list_of_records_that_hold_objects_of_many_kinds(tmp_path):
    """Braces in texts, words with their boxes before the turns, turns below another key: whatever
    a record holds, it comes once, in shards of any length."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    before = [{"words": [{"text": f"w{i}", "box": [i, 2, 3, 4]} for i in range(60)]},
              {"text": ', {"a": [{ \\frac{a}{b}' * 20}, {"meta": {"messages": []}},
              {"history": [{"messages": turns}, {"messages": turns}]}, {}]
    records = [{"id": i, **before[i % len(before)], "messages": turns} for i in range(200)]
    path = tmp_path / "list.json"
    for indent in (None, 2):
        path.write_text(json.dumps(records, indent=indent))
        with path.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for length in (len(text), 40_000, 4_001):
            spans = [span for start in range(0, len(text), length)
                     for span in list_spans(text, start, start + length)]
            found = [json.loads(text[start:stop])["id"] for start, stop in spans]
            assert found == list(range(200))


@pytest.mark.parametrize("text, bad", [
    ("[{0}][{1}]", [5]), ("[{0}, {1}] and more", [10]), ("[{0}\n{1}]", []),
    ('[{0}, {{"pad": 1, "history": [{1}], "messages": [], "z": 1}}]', [])])
def test_lists_that_are_nearly_in_order(tmp_path, text, bad):
    """Two lists one behind the other, text behind one, no commas, a last record that holds others:
    no record is lost, and no more is bad than is, in shards of any length that is more than a list
    in a record has."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * 300}]
    records = [json.dumps({"id": i, "messages": turns}) for i in range(10)]
    path = tmp_path / "list.json"
    between = "\n" if "\n" in text else ", "
    path.write_text(text.format(between.join(records[:5]), between.join(records[5:])))
    has_inner = "history" in text
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for length in (len(whole), 2600) if has_inner else (len(whole), 1000, 701):
        spans = [span for start in range(0, len(whole), length)
                 for span in list_spans(whole, start, start + length)]
        found, n_bad = [], 0
        for start, stop in spans:
            try:
                record = json.loads(whole[start:stop].strip(b" \n,"))
                found.append(record.get("id", "the last"))
            except ValueError:
                n_bad += 1
        assert found == ([*range(5), "the last"] if has_inner else [*range(10)]), length
        assert n_bad == len(bad), length


def test_a_million_samples_cost_no_memory(tmp_path):
    """And no scan: `pytest -s` shows the seconds from the process's start to its first batch,
    imports included."""
    line = json.dumps({"messages": messages(("what is it?", "K7Q2"))}) + "\n"
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
