"""The samples of --data in their order: permuted, mixed, dealt out to the ranks, and counted where they are bad.

The order depends on the seed and the epoch alone, and a Position in it is all that a restart needs: neither the number
of ranks nor that of loading processes matters. A sample that cannot be used leaves a hole, a Bad one, in its step.
"""
import functools
import mmap
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from plumbing.examples import BadSample, Example
from plumbing.formats import (MAX_RECORD, data_files, file_format, json_example, line_spans, list_spans,
                              parquet_example, read_parquet, tar_example, tar_spans)
from plumbing.images import ImageError
from plumbing.settings import InputError
from plumbing.tokenizers import TextError

BAD_KINDS = ["unreadable file", "broken record", "missing field", "empty answer", "image not found",
             "image outside the folder", "unreadable image", "too long"]
GROUP = 8192                # samples that are shuffled together, at least
BLOCK = 2 ** 20             # bytes of a JSON file that make a shard
PARQUET_PARTS = 16          # shards of a parquet file


@dataclass
class Bad:
    """The hole that a bad sample leaves in its step."""
    kind: str
    why: str
    reference: tuple        # where it lies: Documents.where says it in words


@dataclass
class Position:
    """How far an order of samples has come: all that a restart needs, on any number of ranks and workers."""
    epoch: int = 0
    taken: list[int] = field(default_factory=list)      # samples drawn in this epoch, of each data set
    places: list[tuple] = field(default_factory=list)   # where each data set is (DataSet.references)


class DataSet:
    """Samples of files, streamed in an order that depends on (seed, epoch) alone.

    A shard is a tar, 1 MB of a JSON file or a sixteenth of a parquet file's rows. Shards are permuted; those that
    together hold GROUP samples are indexed, which reads headers and looks for line ends, and their samples permuted.
    """

    def __init__(self, paths: list[str], seed: int):
        self.seed, self.files, self.shards = seed, [], []
        for file, root in {file: root for root, files in map(data_files, paths) for file in files}.items():
            kind, parts = file_format(file), 1
            if kind in ("json", "jsonl"):
                parts = -(-file.stat().st_size // BLOCK)
            elif kind == "parquet":
                parts = PARQUET_PARTS
            self.shards += [(len(self.files), part, parts) for part in range(parts)]
            self.files.append((root, file, kind))
        if not any(kind for _, _, kind in self.files):
            raise InputError(f"{self.files[0][1]}: neither tar nor parquet nor JSON")

    def index(self, shard: int) -> list[tuple[int, int]]:
        """The samples of a shard as (start, stop), in bytes or rows; stop is -1 where the file is damaged."""
        file, part, parts = self.shards[shard]
        _, path, kind = self.files[file]
        try:
            match kind:
                case "tar":
                    return tar_spans(path)
                case "parquet":
                    n = read_parquet(path).metadata.num_rows
                    return [(row, row + 1) for row in range(n * part // parts, n * (part + 1) // parts)]
                case "json" | "jsonl":
                    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                        return (line_spans if kind == "jsonl" else list_spans)(text, part * BLOCK, (part + 1) * BLOCK)
        except InputError:
            raise
        except (OSError, ValueError, tarfile.TarError):
            pass
        return [(0, -1)] if part == 0 else []

    @functools.lru_cache(maxsize=8)         # the first one serves estimate() and the epoch
    def group(self, epoch: int, first: int) -> tuple[list[tuple[int, int, int]], int]:
        """The references (shard, start, stop) of a group in their order, and where in the shards the next begins."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        references, after = [], first
        while len(references) < GROUP and after < len(order):
            references += [(order[after], *span) for span in self.index(order[after])]
            after += 1
        shuffled = np.random.default_rng([self.seed, epoch, first]).permutation(len(references))
        return [references[i] for i in shuffled], after

    def references(self, epoch: int = 0, first: int = 0, taken: int = 0) -> Iterator[tuple]:
        """(reference, place after it) from the place (epoch, first shard of the group, taken from the group) on, for
        ever; None instead of a reference where an epoch ends."""
        with ThreadPoolExecutor(1) as ahead:        # puts the next group into the cache while this one is used
            while True:
                while first < len(self.shards):
                    references, after = self.group(epoch, first)
                    if not references and after - first == len(self.shards):
                        raise InputError(f"{self.files[0][1]}: not a single sample there")
                    ahead.submit(self.group, *((epoch, after) if after < len(self.shards) else (epoch + 1, 0)))
                    for i in range(taken, len(references)):
                        yield references[i], (epoch, first, i + 1)
                    first, taken = after, 0
                epoch, first = epoch + 1, 0
                yield None, (epoch, 0, 0)

    def estimate(self) -> int:
        """About how many samples there are, from the first group."""
        references, after = self.group(0, 0)
        return round(len(references) * len(self.shards) / after)

    def where(self, shard: int, start: int, stop: int) -> str:
        """Where a sample lies, in words: a tar's member, or the line of a JSONL file, which is counted now."""
        _, path, kind = self.files[self.shards[shard][0]]
        if kind not in ("tar", "jsonl") or stop < 0:
            return f"{path}, {'row' if kind == 'parquet' else 'byte'} {start}"
        with path.open("rb") as file:
            if kind == "tar":
                file.seek(start)
                return f"{path}, {file.read(100).partition(bytes(1))[0].decode(errors='replace')}"
            before = sum(block.count(b"\n") for block in iter(lambda: file.read(min(BLOCK, start - file.tell())), b""))
        return f"{path}, line {before + 1}"

    def read(self, shard: int, start: int, stop: int) -> Example:
        """Read and decode one sample. Raises BadSample or ImageError."""
        root, path, kind = self.files[self.shards[shard][0]]
        if stop < 0:
            raise BadSample("unreadable file", "damaged or cut off from here")
        if stop - start > MAX_RECORD:
            raise BadSample("broken record", f"{stop - start:,} bytes are more than {MAX_RECORD:,}")
        key = f"{path}:{start}"
        if kind == "parquet":
            return parquet_example(path, start, key)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        return tar_example(data, key) if kind == "tar" else json_example(data, (path.parent, root), key)


class Documents(Dataset):
    """The samples of --data, ready for the model; a Bad one where a sample cannot be used.

    specs: PATH, or PATH:WEIGHT for a data set of its own, of which WEIGHT samples are drawn for one of a set with
    weight 1. An epoch ends when the first set is through; the others go on from there, and begin anew as they end.
    """

    def __init__(self, specs: list[str], seed: int, prepare: "Callable[[Example], Sample]"):
        parsed = [re.fullmatch(r"(.*?)(?::(\d+(?:\.\d+)?))?", spec, re.S).groups() for spec in specs]
        if any(weight and float(weight) == 0 for _, weight in parsed):
            raise InputError(f"{' '.join(specs)}: a weight is more than 0")
        weighted = any(weight for _, weight in parsed)
        self.sets = [DataSet([path], seed) for path, _ in parsed] if weighted else [DataSet(specs, seed)]
        self.weights = [float(weight or 1) for _, weight in parsed] if weighted else [1.0]
        self.prepare = prepare

    def __getitem__(self, reference: "tuple | Position") -> "Sample | Bad | Position":
        if isinstance(reference, Position):         # the end of a step, on its way through the loader
            return reference
        try:
            return self.prepare(self.sets[reference[0]].read(*reference[1:]))
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
        return self.sets[bad.reference[0]].where(*bad.reference[1:])

    def draws(self, p: Position) -> Iterator[tuple[tuple | None, Position]]:
        """(reference, position after it) for ever; None for a reference where an epoch ends."""
        taken, places = p.taken or [0] * len(self.sets), p.places or [(0, 0, 0)] * len(self.sets)
        epoch, streams = p.epoch, [s.references(*place) for s, place in zip(self.sets, places)]
        while True:
            i = min(range(len(self.sets)), key=lambda i: (taken[i] + 1) / self.weights[i])
            reference, place = next(streams[i])
            places = [*places[:i], place, *places[i + 1:]]
            if reference is not None:
                taken = [n + (i == k) for k, n in enumerate(taken)]
            elif place[0] > epoch:
                epoch, taken = epoch + 1, [0] * len(taken)
            else:
                continue        # it has been through less often than the one that makes the epochs
            yield reference and (i, *reference), Position(epoch, taken, places)

    def epoch_samples(self) -> int:
        """About how many samples an epoch has."""
        return round(min(s.estimate() / w for s, w in zip(self.sets, self.weights)) * sum(self.weights))


def deal(draws: Iterator[tuple], batch_size: int, rank: int, world: int) -> Iterator:
    """The references of one rank, and after those of each step the Position that all ranks have then reached.

    A step owns batch_size draws in a row, or what is left of an epoch; they are dealt out to the ranks in turn.
    """
    n, reached = 0, None
    for reference, position in draws:
        if n == batch_size or n and reference is None:
            yield position if reference is None else reached
            n = 0
        if reference is not None:
            if n % world == rank:
                yield reference
            n, reached = n + 1, position


def steps_of(loader) -> Iterator[tuple[list, Position]]:
    """What the loader brings, step by step: samples (or holes) of this rank, and the Position after them."""
    samples = []
    for item in loader:
        if isinstance(item, Position):
            yield samples, item
            samples = []
        else:
            samples.append(item)


def agree_on_position(position: Position, stop: bool) -> bool:
    """Where ranks meet before a step: at the same place of the data, or they would repeat and lose samples.

    Returns whether any of them was asked to stop. Raises InputError, on all ranks.
    """
    mark = zlib.crc32(repr(position).encode())
    marks = torch.tensor([mark, -mark, stop])
    dist.all_reduce(marks, dist.ReduceOp.MAX)
    if marks[0] != -marks[1]:
        raise InputError("the ranks read different data: is --data the same, and readable, on every node?")
    return bool(marks[2])


def keep_good(samples: "list[Sample | Bad]", documents: Documents, counts: Counter) -> "list[Sample]":
    """The good ones of this rank's samples; adds to counts.

    counts: samples seen, and bad ones by kind, of all ranks. The first bad one of a kind is shown on stderr.
    """
    bad = [s for s in samples if isinstance(s, Bad)]
    for first in {s.kind: s for s in reversed(bad) if not counts[s.kind]}.values():
        why = " ".join(first.why.split())[:200]
        tqdm.write(f"bad sample, {first.kind}: {documents.where(first)}: {why}", file=sys.stderr)
    seen = torch.tensor([len(samples), *(sum(s.kind == kind for s in bad) for kind in BAD_KINDS)])
    dist.all_reduce(seen)
    counts.update(dict(zip(["seen", *BAD_KINDS], seen.tolist())))
    return [s for s in samples if not isinstance(s, Bad)]


def check_bad_share(counts: Counter, max_bad: float) -> None:
    """Raise InputError if more than a share of max_bad of the samples seen was bad."""
    bad = {kind: counts[kind] for kind in BAD_KINDS if counts[kind]}
    if sum(bad.values()) > max_bad * counts["seen"]:
        table = "".join(f"\n{n:10,}  {kind}" for kind, n in bad.items())
        raise InputError(f"{sum(bad.values()):,} of {counts['seen']:,} samples were bad, more than --max-bad {max_bad}:"
                         + table)
