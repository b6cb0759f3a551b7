"""The samples of --data in their order: permuted, mixed, dealt out to the ranks, and counted where
they are bad.

    documents = Documents(["cc12m/"], seed=0, prepare=functools.partial(data.prepare, ...))
    sampler = deal(documents.draws(Position()), batch_size, rank, world)
    loader = DataLoader(documents, batch_size=None, sampler=sampler)
    for samples, position in steps_of(loader):          # a step's, of this rank
        good = keep_good(samples, documents, counts)

The order depends on the seed and the epoch alone, and a Position in it is all that a restart needs:
neither the number of ranks nor that of loading processes matters. In the place of a sample that
cannot be used stands a Bad one. What a sample is, `prepare` says; nothing here knows of tokens.
"""
import contextlib
import itertools
import math
import mmap
import os
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from plumbing.examples import BadSample, Example
from plumbing.files import file_mark
from plumbing.folders import data_files, file_format, path_exists
from plumbing.formats import (DAMAGED, MAX_RECORD, TWICE, Span, json_example, line_spans,
                              list_spans, parquet_example, read_parquet, tar_example, tar_spans)
from plumbing.images import ImageError
from plumbing.settings import InputError
from plumbing.texts import in_one_line
from plumbing.tokenizers import TextError

BAD_KINDS = ["unreadable file", "broken record", "missing field", "empty answer", "image not found",
             "image outside the folder", "unreadable image", "too long", "ambiguous",
             "not implemented"]
GROUP = 8192            # samples that are shuffled together, at least
BLOCK = 2 ** 20         # bytes of a JSON file that make a shard
PARQUET_SHARDS = 16     # shards of a parquet file
COUNTED = 16            # shards of tars and JSON of which the samples are counted beforehand

Sample = TypeVar("Sample")              # what `prepare` makes of an Example: a data.Sample
Reference = tuple[int, int, int]        # a sample of a DataSet: (shard, start, stop)
Place = tuple[int, int, int]            # in its order: (epoch, first shard of a group, taken of it)


@dataclass
class Bad:
    """What stands in a step in the place of a sample that cannot be used."""
    kind: str               # one of BAD_KINDS
    why: str
    reference: tuple        # where it lies: Documents.where says it in words


@dataclass
class Position:
    """How far an order of samples has come: all that a restart needs, on any number of ranks and
    workers."""
    epoch: int = 0
    taken: list[int] = field(default_factory=list)      # of each data set: samples of this epoch
    places: list[Place] = field(default_factory=list)   # of each data set: where it is


# --------------------------------------------------------------------------------------------------
# One data set


class DataSet:
    """Samples of files, streamed in an order that depends on (seed, epoch) alone.

    A shard is a tar, 1 MB of a JSON file or a sixteenth of a parquet file's rows. Shards are
    permuted. Those that together hold GROUP samples are indexed, which reads headers and looks for
    line ends, and their samples are permuted.
    """

    def __init__(self, paths: list[str], seed: int, held_out: bool = False):
        self.seed = seed
        self.files: list[tuple[Path, Path, str | None]] = []    # (images' folder, file, format)
        self.shards: list[tuple[int, int, int]] = []            # (file, part, parts)
        roots: dict[Path, Path] = {}        # by file: what two of the paths name is there once
        for path in paths:
            root, files = data_files(path, held_out)
            roots.update({file: root for file in files})
        for file, root in roots.items():
            kind = file_format(file)
            parts = 1
            if kind in ("json", "jsonl"):
                parts = -(-file.stat().st_size // BLOCK)            # rounded up
            elif kind == "parquet":
                parts = PARQUET_SHARDS
            self.shards += [(len(self.files), part, parts) for part in range(parts)]
            self.files.append((root, file, kind))
        if not any(kind for _, _, kind in self.files):
            raise InputError(f"{self.files[0][1]}: neither tar nor parquet nor JSON")

    def index(self, shard: int) -> list[Span]:
        """The samples of a shard as (start, stop), in bytes or rows; stop is DAMAGED or TWICE
        for what cannot be read."""
        file_number, part, parts = self.shards[shard]
        _, path, kind = self.files[file_number]
        try:
            if kind == "tar":
                return tar_spans(path)
            if kind == "parquet":
                n_rows = read_parquet(path).metadata.num_rows
                rows = range(n_rows * part // parts, n_rows * (part + 1) // parts)
                return [(row, row + 1) for row in rows]
            if kind in ("json", "jsonl"):
                spans = line_spans if kind == "jsonl" else list_spans
                with (path.open("rb") as file,
                      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text):
                    return spans(text, part * BLOCK, (part + 1) * BLOCK)
        except InputError:
            raise
        except (OSError, ValueError, tarfile.TarError):
            pass
        return [(0, DAMAGED)] if part == 0 else []       # damaged from its start: said once

    def group(self, epoch: int, first: int) -> tuple[list[Reference], int]:
        """The references of a group in their order, and the place in the permuted shards where the
        next group begins. The group begins at `first`."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        references: list[Reference] = []
        after = first
        while len(references) < GROUP and after < len(order):
            shard = order[after]
            references += [(shard, start, stop) for start, stop in self.index(shard)]
            after += 1
        permutation = np.random.default_rng([self.seed, epoch, first]).permutation(len(references))
        return [references[i] for i in permutation], after

    def references(self, start: Place = (0, 0, 0)) -> Iterator[tuple[Reference | None, Place]]:
        """(reference, place after it) from a place on, for ever; None for a reference where an
        epoch ends. Raises InputError where there is not a single sample."""
        epoch, first, taken = start
        with ThreadPoolExecutor(1) as ahead:        # indexes the next group meanwhile
            coming = ahead.submit(self.group, epoch, first)
            while True:
                references, after = coming.result()
                if not references and after - first == len(self.shards):
                    raise InputError(f"{self.files[0][1]}: not a single sample there")
                is_last = after == len(self.shards)
                following = (epoch + 1, 0) if is_last else (epoch, after)
                coming = ahead.submit(self.group, *following)
                for i in range(taken, len(references)):
                    yield references[i], (epoch, first, i + 1)
                epoch, first = following
                taken = 0
                if is_last:
                    yield None, (epoch, 0, 0)

    def estimate(self) -> int:
        """About how many samples there are: parquet files say how many rows they have; of the other
        shards a few are counted."""
        n_rows = 0
        for _, path, kind in self.files:
            if kind == "parquet":
                with contextlib.suppress(OSError, ValueError):      # a damaged file has none
                    n_rows += read_parquet(path).metadata.num_rows
        others = [shard for shard, (file, _, _) in enumerate(self.shards)
                  if self.files[file][2] != "parquet"]
        order = np.random.default_rng(self.seed).permutation(others)[:COUNTED].tolist()
        counts = [len(self.index(shard)) for shard in order]
        return n_rows + round(sum(counts) * len(others) / max(1, len(counts)))

    def where(self, shard: int, start: int, stop: int) -> str:
        """Where a sample lies, in words: a tar's member, or the line of a JSONL file, which is
        counted now."""
        _, path, kind = self.files[self.shards[shard][0]]
        if kind == "tar" and stop != DAMAGED:
            with path.open("rb") as file:
                file.seek(start)
                name = file.read(100).partition(bytes(1))[0]    # its header's first field
            return f"{path}, {name.decode(errors='replace')}"
        if kind == "jsonl" and stop >= 0:
            return f"{path}, line {1 + count_lines(path, start)}"
        return f"{path}, {'row' if kind == 'parquet' else 'byte'} {start}"

    def read(self, shard: int, start: int, stop: int) -> Example:
        """Read and decode one sample.

        Raises BadSample, ImageError, OSError, tarfile.TarError, ValueError or RecursionError where
        it is damaged, InputError where a package is missing.
        """
        root, path, kind = self.files[self.shards[shard][0]]
        if stop == DAMAGED:
            raise BadSample("unreadable file", "damaged or cut off from here")
        if stop == TWICE:
            raise BadSample("ambiguous", "its name comes twice in the tar, or its members do not "
                                         "stand together")
        if stop - start > MAX_RECORD:
            raise BadSample("broken record", f"{stop - start:,} bytes are more than {MAX_RECORD:,}")
        key = f"{path}:{start}"
        if kind == "parquet":
            return parquet_example(path, start, key, root)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if kind == "tar":
            return tar_example(data, key)
        return json_example(data, (path.parent, root), key)


def count_lines(path: Path, stop: int) -> int:
    """How many lines end in the first `stop` bytes of a file."""
    n = 0
    with path.open("rb") as file:
        while file.tell() < stop:
            block = file.read(min(BLOCK, stop - file.tell()))
            if not block:
                break
            n += block.count(b"\n")
    return n


# --------------------------------------------------------------------------------------------------
# All data sets together


def path_and_weight(spec: str) -> tuple[str, str | None]:
    """PATH or PATH:WEIGHT; what is there under its whole name is a path."""
    if path_exists(spec):
        return spec, None
    return re.fullmatch(r"(.*?)(?::(\d+(?:\.\d+)?))?", spec, re.S).groups()


def full_spec(spec: str) -> str:
    """PATH:WEIGHT in the one way to write it: absolute and without links."""
    path, weight = path_and_weight(spec)
    return os.path.realpath(path) + (f":{float(weight):g}" if weight else "")


class Documents(Dataset):
    """The samples of --data, ready for the model; a Bad one where a sample cannot be used.

    specs: PATH or PATH:WEIGHT. Without any weight all paths are one data set. With one, each path
    is a data set of its own, of weight 1 where it names none; WEIGHT samples of it are drawn for
    one of a set with weight 1. An epoch ends when the first set is through; the others go on from
    there, and begin anew as they end. prepare: makes a sample of an Example, as data.prepare does;
    it may raise BadSample or TextError. held_out: of folders the files for evaluation are taken
    (plumbing/folders.py). Raises InputError for a path without data, and for a weight of 0.
    """

    def __init__(self, specs: list[str], seed: int, prepare: Callable[[Example], Sample],
                 held_out: bool = False):
        self.prepare = prepare
        self.sets: list[DataSet] = []
        self.weights: list[float] = []
        parsed = [path_and_weight(spec) for spec in specs]
        if not any(weight for _, weight in parsed):                 # all of them are one data set
            self.sets.append(DataSet(specs, seed, held_out))
            self.weights.append(1.0)
            return
        for path, weight in parsed:
            weight = float(weight or 1)
            if not 0 < weight < math.inf:
                raise InputError(f"{' '.join(specs)[:200]}: a weight is a finite number above 0")
            self.sets.append(DataSet([path], seed, held_out))
            self.weights.append(weight)

    def __getitem__(self, reference: tuple | Position) -> Sample | Bad | Position:
        """reference: (number of the data set, shard, start, stop). A Position, which ends a step,
        is handed through."""
        if isinstance(reference, Position):
            return reference
        number, *place = reference
        try:
            return self.prepare(self.sets[number].read(*place))
        except BadSample as bad:
            return Bad(*bad.args, reference)
        except ImageError as error:
            return Bad("unreadable image", str(error), reference)
        except TextError as error:
            return Bad("broken record", str(error), reference)
        except InputError:
            raise
        except (OSError, tarfile.TarError) as error:
            return Bad("unreadable file", str(error), reference)
        except (ValueError, RecursionError) as error:
            return Bad("broken record", str(error), reference)

    def where(self, bad: Bad) -> str:
        """Where a bad sample lies, in words."""
        number, *place = bad.reference
        try:
            return self.sets[number].where(*place)
        except OSError:                 # the file itself cannot be read any more
            shard, start, _ = place
            data_set = self.sets[number]
            file = data_set.shards[shard][0]
            return f"{data_set.files[file][1]}, byte {start}"

    def draws(self, start: Position) -> Iterator[tuple[tuple | None, Position]]:
        """(reference, position after it) from a position on, for ever; None for a reference where
        an epoch ends."""
        n = len(self.sets)
        epoch = start.epoch
        taken = list(start.taken) or [0] * n
        places = list(start.places) or [(0, 0, 0)] * n
        streams = [data_set.references(place) for data_set, place in zip(self.sets, places)]
        while True:
            # The set that is furthest behind its weight is next.
            progress = [(taken[i] + 1) / self.weights[i] for i in range(n)]
            i = progress.index(min(progress))
            reference, places[i] = next(streams[i])
            if reference is not None:
                taken[i] += 1
                yield (i, *reference), Position(epoch, list(taken), list(places))
            elif places[i][0] > epoch:
                epoch += 1
                taken = [0] * n
                yield None, Position(epoch, list(taken), list(places))
            # else: it has been through less often than the one that makes the epochs, and goes on

    def listing_mark(self) -> int:
        """A checksum of the files' names and of how they are cut into shards."""
        sets = [(data_set.shards, [(file.name, kind) for _, file, kind in data_set.files])
                for data_set in self.sets]
        return zlib.crc32(repr(sets).encode())

    def file_marks(self) -> dict[str, list[int]]:
        """path -> [bytes, checksum of some of them] of all files: the order of the samples depends
        on what lies in them."""
        files = [file for data_set in self.sets for _, file, kind in data_set.files if kind]
        return {os.path.realpath(file): file_mark(file) for file in files}

    def epoch_samples(self) -> int:
        """About how many samples an epoch has."""
        rounds = min(data_set.estimate() / weight
                     for data_set, weight in zip(self.sets, self.weights))
        return round(rounds * sum(self.weights))


# --------------------------------------------------------------------------------------------------
# Steps


def numbered_draws(n: int, start: Position) -> Iterator[tuple[int | None, Position]]:
    """As Documents.draws, of n samples that are drawn by their number: one epoch, in order."""
    first = start.taken[0] if start.taken else 0
    for i in range(first, n):
        yield i, Position(0, [i + 1])
    yield None, Position(1)


def deal(draws: Iterator[tuple], batch_size: int, rank: int, world: int) -> Iterator:
    """The references of one rank, and after those of each step the Position that all ranks have
    then reached.

    A step owns batch_size draws in a row, or what is left of an epoch; they are dealt out to the
    ranks in turn.
    """
    n = 0               # draws of this step
    reached = None      # the Position after the last of them
    for reference, position in draws:
        if reference is None:               # the epoch ends
            if n > 0:
                yield position
            n = 0
            continue
        if n == batch_size:
            yield reached
            n = 0
        if n % world == rank:
            yield reference
        n += 1
        reached = position


def steps_of(loader) -> Iterator[tuple[list[Sample | Bad], Position]]:
    """What the loader brings, step by step: samples of this rank, and the Position after them."""
    samples = []
    for item in loader:
        if isinstance(item, Position):
            yield samples, item
            samples = []
        else:
            samples.append(item)


def agree_on_files(documents: Documents) -> None:
    """At a stage's start: see that all ranks have the same files. Raises InputError, on all ranks.

    A file more or less changes the order of the samples, but not always the Positions in it.
    """
    agree(documents.listing_mark(), False)


def agree_on_position(position: Position, stop: bool) -> bool:
    """Before a step: see that all ranks are at the same place of the data, or they would repeat and
    lose samples.

    Returns whether any of them was asked to stop. Raises InputError, on all ranks.
    """
    return agree(zlib.crc32(repr(position).encode()), stop)


def agree(mark: int, stop: bool) -> bool:
    """Raise InputError, on all ranks, unless all have the same mark. Returns whether any of them
    was asked to stop."""
    highest = torch.tensor([mark, -mark, stop])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if highest[0] != -highest[1]:           # the highest mark is not the lowest
        raise InputError("the ranks read different data: is --data the same, and readable, on "
                         "every node?")
    return bool(highest[2])


def keep_good(samples: list[Sample | Bad], documents: Documents,
              counts: Counter) -> list[Sample]:
    """The good ones of this rank's samples; adds to counts, and shows the first bad one of a kind.

    counts: samples seen, and bad ones by kind, of all ranks.
    """
    good = [sample for sample in samples if not isinstance(sample, Bad)]
    bad = [sample for sample in samples if isinstance(sample, Bad)]
    shown = {kind for kind in BAD_KINDS if counts[kind]}
    for sample in bad:
        if sample.kind not in shown:
            shown.add(sample.kind)
            why = " ".join(sample.why.split())[:200]
            line = f"bad sample, {sample.kind}: {documents.where(sample)}: {why}"
            tqdm.write(in_one_line(line), file=sys.stderr)
    kinds = Counter(sample.kind for sample in bad)
    totals = torch.tensor([len(samples), *(kinds[kind] for kind in BAD_KINDS)])
    dist.all_reduce(totals)
    counts.update(dict(zip(["seen", *BAD_KINDS], totals.tolist())))
    return good


def first_references(documents: Dataset, n: int) -> list:
    """The first n references, or those of an epoch, if it has fewer."""
    references = []
    for reference, _ in itertools.islice(documents.draws(Position()), n):
        if reference is None:
            break
        references.append(reference)
    return references


def check_usable(documents: Documents, n: int) -> None:
    """Raise InputError if not one of the first n samples, or of an epoch's, can be used. It reads
    until one can."""
    references = first_references(documents, n)
    for reference in references:
        sample = documents[reference]
        if not isinstance(sample, Bad):
            return
    raise InputError(f"{documents.where(sample)}: {sample.kind} ({sample.why}), and so are all of "
                     f"the first {len(references)} samples: none can be used")


def check_same_files(before: dict[str, list[int]], now: dict[str, list[int]]) -> None:
    """Raise InputError if the files of --data are not those of `before`: the samples would go on
    in another order, some twice and some never. Both: Documents.file_marks's."""
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) == now.get(path):
            continue
        was, has = (f"{marks[path][0]:,} bytes" if path in marks else "no such file"
                    for marks in (before, now))
        if was == has:
            has = "other bytes"
        raise InputError(f"{path}: {has} now, and {was} when the training state was written: put "
                         "back what was there, or begin the stage anew in another --out")


def check_bad_share(counts: Counter, max_bad: float) -> None:
    """Raise InputError if more than a share of max_bad of the samples seen was bad. counts:
    keep_good's."""
    bad = {kind: counts[kind] for kind in BAD_KINDS if counts[kind]}
    n_bad = sum(bad.values())
    if n_bad > max_bad * counts["seen"]:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in bad.items())
        raise InputError(f"{n_bad:,} of {counts['seen']:,} samples were bad, more than --max-bad "
                         f"{max_bad}: {kinds}")
