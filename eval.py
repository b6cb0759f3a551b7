"""Answer questions about documents, and score the answers: the paper's Tables 1, 2 and 3.

    python eval.py                                              # the newest model reads 200 drawn documents
    python eval.py --benchmark DocVQA=LMUData/DocVQA_VAL.tsv WTQ=DocDownstream-1.0/test/WikiTableQuestions_test.jsonl
    torchrun --nproc_per_node 8 eval.py --checkpoint out/llama-3.2-1b/stage3 --benchmark LMUData/ChartQA_TEST.tsv
    python eval.py --noise-relative 0.5 1 2                     # once more with noise on F, in standard deviations of F
    python eval.py --vocab 50                                   # which words P_vocab takes on 50 pages (section 5.3)
    python eval.py --score out/toy/stage3/eval/toy.jsonl        # scores predictions again, without a model

Predictions go to OUT/BENCHMARK.jsonl. The same command goes on where it was interrupted, on any number of processes.
paper/benchmarks.py says which files are read, paper/metrics.py how answers are scored.

Below that is what train.py needs beside its method: processes that find each other, and training states on disk.
"""
import argparse
import contextlib
import ctypes
import json
import os
import shutil
import sys
import time
import traceback
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from data import READ, Example, Tokenizer, Turn, prepare
from model import IMAGE, AlignVLM
from paper.benchmarks import Benchmark, open_benchmark
from paper.metrics import METRICS, edit_distance
from paper.noise import STD_PAGES, feature_std, noise_on
from paper.predictions import begin_predictions, join_predictions, read_predictions, write_text
from paper.tables import noise_table, score_tables
from paper.words import vocab_report
from plumbing.streams import Position
from plumbing.weights import InputError, read_json
from toy.pages import draw, held_out_documents, write_toy_tokenizer
from vision import tile, tile_boxes

IN_THE_BOX = Path(__file__).parent / "toy"


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The highest stage of the run that was trained last, of the runs out/*/stageN."""
    stages = [path.parent for path in out.glob("*/stage[123]/config.json")]
    if not stages:
        raise InputError(f"no trained model under {out}/: run `python train.py` first, or name one with --checkpoint")
    run = max(stages, key=lambda folder: (folder / "config.json").stat().st_mtime).parent
    return max(folder for folder in stages if folder.parent == run)


def default_model() -> Path:
    """The newest trained model, or else the one in the box. Raises InputError where there is neither."""
    try:
        return newest_checkpoint()
    except InputError:
        if not (IN_THE_BOX / "stage3" / "config.json").exists():
            raise
        print("nothing is trained under out/: this is the model in the box", file=sys.stderr)
        return IN_THE_BOX / "stage3"


def answer(model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image | list[Image.Image]], prompts: list[str],
           max_tiles: int = 9, **generation) -> Iterator[list[str]]:
    """Answer each (image or images, prompt) as one batch; yields what is there after every token, last the whole.

    generation: what AlignVLM.generate takes (max_new_tokens, temperature, top_p, seed). An empty prompt asks for a
    caption: the user's turn is the image alone, as in stage 1.
    """
    samples = []
    for pages, prompt in zip(images, prompts):
        pages = pages if isinstance(pages, list) else [pages]
        turn = Turn("user", [IMAGE] * len(pages) + ([prompt] if prompt else []))
        samples.append(prepare(Example(pages, [turn], ""), tokenizer, model.config.vision, max_tiles,
                               tile_tokens=model.config.tile_tokens))
    ids: list[list[int]] = [[] for _ in samples]
    for step in model.generate([s.tokens for s in samples], [s.pixels for s in samples], tokenizer.stop, **generation):
        for row, token in zip(ids, step):
            row += [] if token is None else [token]
        yield [tokenizer.decode(row) for row in ids]
    yield [tokenizer.decode(row) for row in ids]


def whole(model: AlignVLM) -> AlignVLM:
    """A copy of a model that is cut among ranks, in one piece on each: for small ones."""
    weights = {name: p.full_tensor() for name, p in model.state_dict().items()}
    copy = AlignVLM(model.config).to(next(iter(weights.values())).device).eval()
    copy.load_state_dict(weights)
    return copy


def held_out_scores(model: AlignVLM, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, dict]:
    """Read n held-out documents aloud and answer one question about each, greedily, 50 at a time.

    Returns exact_match (of answers), cer (edit distance over reference characters) and n, of each kind of page, of
    pages of one and of several tiles, and last of all "held-out" ones.
    """
    documents = held_out_documents(n, seed)
    right, errors, characters, count = (Counter() for _ in range(4))
    for first in tqdm(range(0, n, 50), desc="reading held-out pages"):
        some = documents[first:first + 50]
        images = [draw(page) for page, _, _ in some]
        *_, texts = answer(model, tokenizer, images, [READ] * len(some))
        *_, answers = answer(model, tokenizer, images, [prompt for _, prompt, _ in some])
        for (page, _, gold), text, prediction in zip(some, texts, answers):
            for group in (page.kind, "several tiles" if page.large else "one tile", "held-out"):
                right[group] += prediction == gold
                errors[group] += edit_distance(text, page.text)
                characters[group] += len(page.text)
                count[group] += 1
    groups = sorted(set(count) - {"held-out"}) + ["held-out"]
    return {group: {"exact_match": right[group] / count[group], "cer": errors[group] / characters[group],
                    "n": count[group]} for group in groups}


def report(folder: Path, n: int, seed: int, device: torch.device) -> None:
    """Score a trained toy: held_out.json in its folder, and a line for each kind of page."""
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    scores = held_out_scores(model, Tokenizer(folder, model.config.llm.vocab_size), n, seed)
    (folder / "held_out.json").write_text(json.dumps(scores, indent=2) + "\n")
    for group, s in scores.items():
        print(f"{group}: exact_match={s['exact_match']:.3f} cer={s['cer']:.3f} n={s['n']}")


# ---------------------------------------------------------------------------------------------------------------------
# The paper's benchmarks: predictions, OUT/BENCHMARK.jsonl, and what they score


def fingerprint(model: AlignVLM) -> int:
    """What tells one training of a model from another: a checksum of a thousand numbers of each tensor."""
    crc = 0
    for name, p in model.state_dict().items():
        some = p.flatten()[::max(1, p.numel() // 1000)].float().cpu()
        crc = zlib.crc32(some.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def predict(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, stem: str, settings: dict,
            batch_size: int) -> list[dict]:
    """Answer a benchmark's questions, greedily -> its rows with a prediction in each, which are then in STEM.jsonl.

    Every rank calls this: it answers every world-th of the samples that are left, and writes each batch's answers to
    its own STEM.rankR; the first one joins the files, in the benchmark's order, and returns the rows, the others none.
    settings: max_new_tokens, max_tiles and noise (sigma), and what else must be the same for predictions to be
    continued. Raises InputError.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    settings = {**settings, "samples": len(benchmark.rows),
                "questions": zlib.crc32(json.dumps([benchmark.rows, benchmark.prompts]).encode())}
    done = [begin_predictions(stem, settings, len(benchmark.rows)) if rank == 0 else None]
    dist.broadcast_object_list(done)
    todo = [i for i in range(len(benchmark.rows)) if i not in done[0]][rank::world]
    if todo:
        with (open_log(Path(f"{stem}.rank{rank}")) as file, noise_on(model, settings["noise"]) as noise,
              tqdm(total=len(todo), desc=Path(stem).name, disable=rank > 0) as bar):
            for first in range(0, len(todo), batch_size):
                batch = todo[first:first + batch_size]
                images = [benchmark.images(i) for i in batch]
                if noise:
                    noise.samples = [(f"{benchmark.name}/{benchmark.rows[i]['index']}", count_tiles(
                        model, pages, settings["max_tiles"])) for i, pages in zip(batch, images)]
                *_, texts = answer(model, tokenizer, images, [benchmark.prompts[i] for i in batch],
                                   settings["max_tiles"], max_new_tokens=settings["max_new_tokens"])
                for i, text, measured in zip(batch, texts, noise.measured if noise else [None] * len(batch)):
                    file.write(json.dumps({"sample": i, "prediction": text, "measured": measured}) + "\n")
                bar.update(len(batch))
    dist.barrier()
    return join_predictions(benchmark, stem, settings) if rank == 0 else []


def count_tiles(model: AlignVLM, pages: list[Image.Image], max_tiles: int) -> int:
    return sum(len(tile_boxes(*page.size, model.config.vision, max_tiles)) for page in pages)


def evaluate(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, args) -> tuple[dict, list[dict]]:
    """A benchmark's scores by name, and, for each of --noise, sigma, std_F, cosine_distance and the headline score."""
    settings = {"weights": fingerprint(model), "benchmark": benchmark.name, "limit": args.limit,
                "max_new_tokens": args.max_new_tokens, "max_tiles": args.max_tiles, "noise": 0.0}
    benchmark = replace(benchmark, rows=benchmark.rows[:args.limit], prompts=benchmark.prompts[:args.limit])
    rows = predict(model, tokenizer, benchmark, str(args.out / benchmark.name), settings, args.batch_size)
    scores, noise = METRICS[benchmark.name](rows) if rows else {}, []
    std = 1.0
    if args.noise_relative:
        pages = [benchmark.images(i) for i in range(min(STD_PAGES, len(benchmark.rows)))]
        std = feature_std(model, pages, args.max_tiles)
    for given in args.noise or args.noise_relative or []:
        stem = f"{args.out / benchmark.name}.noise-{given:g}" + ("std" if args.noise_relative else "")
        sigma = float(f"{given * std:.6g}")
        rows = predict(model, tokenizer, benchmark, stem, {**settings, "noise": sigma}, args.batch_size)
        if rows:
            noise.append({"sigma": sigma, **read_json(Path(f"{stem}.settings.json"))["measured"],
                          "score": headline(METRICS[benchmark.name](rows))})
    return scores, noise


def headline(scores: dict[str, float]) -> float:
    """A benchmark's first score, the one in the tables, in %."""
    return 100 * next(iter(scores.values()))


def show(results: dict, out: Path | None) -> None:
    """Print the tables, and write them and all scores to OUT/table.md and OUT/scores.json."""
    scores = {name: headline(s) for name, s in results["scores"].items()}
    text = score_tables(scores, results["model"])
    if results["noise"]:
        text += "\n" + noise_table(results["noise"], scores, results["model"])
    for name, s in results["scores"].items():
        print(f"{name}: {' '.join(f'{key}={value:.4f}' for key, value in s.items())}")
    print("\n" + text, end="")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.md", text)
        write_text(out / "scores.json", json.dumps(results, indent=2) + "\n")


def score_files(specs: list[str], out: Path | None) -> None:
    """--score: files of predictions, called BENCHMARK.jsonl or given as BENCHMARK=FILE."""
    results = {"model": "these predictions", "scores": {}, "noise": {}}
    for spec in specs:
        name, _, path = spec.rpartition("=") if not Path(spec).exists() else ("", "", spec)
        name = name or Path(path).name.split(".")[0]
        if name not in METRICS:
            raise InputError(f"{spec}: no benchmark {name}: say NAME={path}, with one of {', '.join(METRICS)}")
        if name in results["scores"]:
            raise InputError(f"{spec}: a second file for {name}: score one at a time")
        try:
            results["scores"][name] = METRICS[name](read_predictions(Path(path)))
        except KeyError as error:
            raise InputError(f"{path}: a row's split is {error}, which {name} does not have") from None
    show(results, out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--benchmark", nargs="+", default=["toy"], metavar="[NAME=]PATH", help="benchmarks as VLMEvalKit (TSV), "
        "DocDownstream (JSONL) or VCR-wiki (parquet) have them, and toy or toy=N, N drawn documents (default: toy)")
    add("--checkpoint", type=Path, help="model folder (default: the newest under out/, or else the one in the box)")
    add("--out", type=Path, help="where predictions, table.md and scores.json go (default: CHECKPOINT/eval, and "
        "out/box/eval for the model in the box)")
    add("--score", nargs="+", metavar="[NAME=]FILE", help="only score files of predictions again")
    add("--vocab", type=int, metavar="N", help="only average P_vocab over the first N samples' pages, into OUT/vocab.png "
        "and vocab.json (needs `pip install matplotlib`)")
    add("--limit", type=int, metavar="N", help="the first N samples of each benchmark (default: all)")
    add("--batch-size", type=int, default=16, help="samples answered together by a process (default: %(default)s)")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    add("--max-tiles", type=int, default=9, help="tiles a page is cut into at most (default: %(default)s)")
    noise = parser.add_mutually_exclusive_group().add_argument
    noise("--noise", type=float, nargs="+", metavar="SIGMA", help="evaluate once more with Gaussian noise of this "
          "standard deviation on the visual features F (the paper: 3)")
    noise("--noise-relative", type=float, nargs="+", metavar="R", help="the same, in standard deviations of F")
    args = parser.parse_args()
    numbers = (args.limit, args.vocab, args.batch_size, args.max_new_tokens, args.max_tiles)
    if min(1 if n is None else n for n in numbers) < 1:
        parser.error("--limit, --vocab, --batch-size, --max-new-tokens and --max-tiles are at least 1")
    if not all(0 < sigma < float("inf") for sigma in args.noise or args.noise_relative or []):
        parser.error("the noise is more than 0: without any the benchmark is evaluated anyway")
    return args


def summary_line(words: dict, out: Path) -> str:
    """What --vocab found, in a sentence."""
    likeliest, blank = words["likeliest"][0], words["blank"][0] if words["blank"] else {"word": "-", "patches": 0.0}
    return (f"{words['words_for_90']:,} of {words['words']:,} words hold 90 % of the probability, "
            f"{words['words_for_99']:,} hold 99 %; the likeliest, {likeliest['word']}, has {likeliest['probability']:.3f}; "
            f"{blank['patches']:.1%} of the blank patches become {blank['word']}: {out}/vocab.png and vocab.json")


def main() -> None:
    args = parse_args()
    if args.score:
        return score_files(args.score, args.out)
    benchmarks = [open_benchmark(spec) for spec in args.benchmark]
    if len({benchmark.name for benchmark in benchmarks}) < len(benchmarks):
        raise InputError(f"--benchmark {' '.join(args.benchmark)}: one file for each benchmark")
    folder = args.checkpoint or default_model()
    args.out = args.out or (Path("out", "box") if folder.parent == IN_THE_BOX else folder) / "eval"
    timeout = timedelta(hours=2)        # of ranks that wait for one with longer answers, or for the first to score
    device, _ = start_processes(timeout)
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    if args.vocab:
        files = [(b, i) for b in benchmarks for i in range(len(b.rows))][:args.vocab]
        pages = (tile(page, model.config.vision, args.max_tiles) for b, i in files for page in b.images(i))
        args.out.mkdir(parents=True, exist_ok=True)
        return print(summary_line(vocab_report(model, tokenizer, pages, args.out / "vocab.png"), args.out))
    results = {"model": str(folder), "weights": fingerprint(model), "scores": {}, "noise": {}}
    if (args.out / "scores.json").exists():     # of other benchmarks: the table is of all that was measured
        before = read_json(args.out / "scores.json")
        if before.get("weights") != results["weights"]:
            raise InputError(f"{args.out / 'scores.json'}: scores of another model: take another --out")
        results |= {key: before[key] for key in ("scores", "noise") if isinstance(before.get(key), dict)}
    with roll_call(timeout):
        for benchmark in benchmarks:
            scores, noise = evaluate(model, tokenizer, benchmark, args)
            results["scores"][benchmark.name] = scores
            if noise:
                noise = {run["sigma"]: run for run in [*results["noise"].get(benchmark.name, []), *noise]}
                results["noise"][benchmark.name] = list(noise.values())
        if dist.get_rank() == 0:
            show(results, args.out)
        dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What every program that runs as one process or many begins with


def keep_heap() -> None:
    """Let glibc keep freed memory: by default each large buffer goes back to the kernel, and its pages fault in anew
    at the next operation, a third of a training step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


def keep_files_open() -> None:
    """Let a process open as many files as it may: each tensor that a loading process hands over is one."""
    if sys.platform != "win32":
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError):       # macOS reports no limit and then refuses to have none
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def start_processes(timeout: timedelta = timedelta(minutes=10)) -> tuple[torch.device, bool]:
    """Join torchrun's processes, or be the only one; nccl on CUDA, gloo on a CPU. timeout: of waiting for another.

    Returns the device of this process, and whether torchrun has restarted any of them.
    """
    keep_heap()
    keep_files_open()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"        # counts travel over gloo
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank,
                                store=own_part(store, rank, world, timeout))
    else:
        dist.init_process_group(backend, timeout=timeout, world_size=1, rank=0, store=dist.HashStore())
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))       # of this node's processes
    dist.all_reduce(restarts, dist.ReduceOp.MAX)
    return device, bool(restarts > 0)


def own_part(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to.

    torchrun keeps its store when it restarts the processes, so they would find the dead ones' addresses (pytorch issue
    135712), and its count of restarts differs between nodes. So the first rank invents a name; another rank takes the
    one it finds only after it was answered under it, which no rank of an earlier attempt can do.
    """
    me, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("attempt", me)
        for other in range(1, world):
            store.set(f"{me}/{store.get(f'{me}/{other}').decode()}", "welcome")
        return dist.PrefixStore(me, store)
    while time.monotonic() < until:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", me)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{name}/{me}"], timedelta(seconds=2))
            return dist.PrefixStore(name, store)
    raise InputError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank 0")


def meet(position: Position, stop: bool) -> bool:
    """Where ranks meet before a step: at the same place of the data, or they would repeat and lose samples.

    Returns whether any of them was asked to stop. Raises InputError, on all ranks.
    """
    mark = zlib.crc32(repr(position).encode())
    marks = torch.tensor([mark, -mark, stop])
    dist.all_reduce(marks, dist.ReduceOp.MAX)
    if marks[0] != -marks[1]:
        raise InputError("the ranks read different data: is --data the same, and readable, on every node?")
    return bool(marks[2])


@contextlib.contextmanager
def roll_call(timeout: timedelta) -> Iterator[None]:
    """If ranks wait in vain for another in here, raise InputError with its name."""
    control = dist.new_group(backend="gloo")
    try:
        yield
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        try:
            dist.monitored_barrier(control, min(timeout, timedelta(seconds=30)), wait_all_ranks=True)
        except RuntimeError as absent:
            raise InputError(f"a rank has stalled or died: {str(absent).splitlines()[0]}") from None
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Training states, and the folders of a run: OUT/stage2 is complete, OUT/stage2.partial holds one that is not


class States:
    """The states of a training run, FOLDER/step-00000100: written beside, then renamed; the last `keep` stay.

    Written by torch.distributed.checkpoint, each rank its part, from copies and while training goes on. PyTorch pickles
    the index inside: load your own only; what one gives to others is the exported model, which is safetensors.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int, timeout: timedelta):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.step = None            # of the newest state, written or loaded
        self.writing = None         # what is written now: a Future, and where it will be
        self.group = dist.new_group(backend="gloo", timeout=timeout)    # the writers talk while training does
        self.state()        # gives moments to every parameter: those that get no gradient belong to the state too
        for moments in optimizer.state.values():
            moments["step"].zero_()

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int, progress: dict) -> None:
        """Begin to write the state before `step`; progress: what goes with it, as JSON. Raises InputError."""
        self.finish()
        if step == self.step:
            return
        self.step, path = step, self.folder / f"step-{step:08}"
        partial = path.with_suffix(".partial")
        try:
            if dist.get_rank() == 0:
                partial.mkdir(exist_ok=True)        # the other ranks' writers make it as well
                (partial / "progress.json").write_text(json.dumps(progress))
            self.writing = dcp.async_save(self.state(), checkpoint_id=partial, process_group=self.group), path
        except OSError as error:
            raise self.not_written(error, partial) from None

    def finish(self, wait: bool = True) -> None:
        """Put what was written in its place: when that is done, or, without `wait`, if it is. Ranks may come to that at
        different steps: they exchange nothing here. Raises InputError."""
        if self.writing is None or not (wait or self.writing[0].done()):
            return
        (future, path), self.writing = self.writing, None
        partial = path.with_suffix(".partial")
        try:
            future.result()         # of the first rank: all have written
            if dist.get_rank() == 0:
                os.rename(partial, path)
                for old in sorted(self.folder.glob("step-????????"))[:-self.keep]:
                    shutil.rmtree(old)
        except (OSError, CheckpointException) as error:
            if "timed out" in str(error).lower():
                raise RuntimeError(f"{partial}: timed out") from None
            raise self.not_written(error, partial) from None

    def not_written(self, error: Exception, partial: Path) -> InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        why, free = (str(error).strip().splitlines() or [repr(error)])[-1], shutil.disk_usage(self.folder).free / 1e9
        return InputError(f"{self.folder}: the training state could not be written ({why}; {free:.1f} GB free); the "
                          f"last good one: {newest_state(self.folder) or 'none'}")

    def load(self, path: Path) -> dict:
        """Take over the state at `path`, whatever number of ranks wrote it; returns its progress. Raises InputError."""
        try:
            progress, state = json.loads((path / "progress.json").read_text()), self.state()
            dcp.load(state, checkpoint_id=path)
            set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
            self.step = progress["step"]
            return progress
        except (OSError, CheckpointException, ValueError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: not a complete training state of this stage ({why})") from None


def check_room(folder: Path, model: nn.Module, keep: int) -> None:
    """Raise InputError if the disk has no room for a run's states (fp32: weights, two moments) and its model."""
    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    there = sum(file.stat().st_size for file in folder.glob("step-*/*"))
    need, free = (keep + 1) * (weights + moments) + weights - there, shutil.disk_usage(folder).free
    if free < need:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, but {keep} training states, one being written, and the "
                         f"model take {need / 1e9:.1f} GB more: free some, or lower --keep")


def newest_state(folder: Path) -> Path | None:
    """The furthest complete training state in a folder."""
    return max(folder.glob("step-????????"), default=None)


def drop_states(folder: Path) -> None:
    for state in folder.glob("step-*"):
        shutil.rmtree(state)


def stage_before(stage: int, out: Path) -> Path:
    """The folder from which a stage starts. Stage 1 of the toy: the LLM in the box, unless this run has its own."""
    folder = out / f"stage{stage - 1}"
    return folder if stage != 1 or (folder / "config.json").exists() else IN_THE_BOX / "stage0"


def origin(folder: Path) -> int | None:
    """What tells one training of the stage before from another: its log's checksum."""
    log = folder / "log.jsonl"
    return zlib.crc32(log.read_bytes()) if log.exists() else None


def recorded(folder: Path, key: str, default=None):
    """A setting of the recipe.json that a stage's folder has, if it has one."""
    try:
        return json.loads((folder / "recipe.json").read_text()).get(key, default)
    except (OSError, ValueError):
        return default


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, started from the stage before it, and is not being made anew."""
    folder, before = out / f"stage{stage}", origin(out / f"stage{stage - 1}")
    return ((folder / "config.json").exists() and newest_state(out / f"stage{stage}.partial") is None
            and (before is None or recorded(folder, "origin", before) == before))


def check_recipe(folder: Path, recipe: dict, otherwise: str) -> None:
    """Raise InputError if a stage was trained, or begun, with another recipe than is asked for now."""
    before = {key: recorded(folder, key, "align" if key == "connector" else value) for key, value in recipe.items()
              if key != "launch" and (key != "origin" or value is not None)}
    changed = [f"{key} {old}, not {recipe[key]}" for key, old in before.items() if old != recipe[key]]
    if changed:
        raise InputError(f"{folder} was trained with {', '.join(changed)}: take another --out, or {otherwise}")


def begin(stage: int, folder: Path, record: dict, model: AlignVLM, resume: str, keep: int) -> Path | None:
    """Make the stage's folder ready to work in. Returns the state to go on from, if any. Raises InputError."""
    try:
        if resume not in ("auto", "never"):
            path = Path(resume)
            if not (path / "progress.json").is_file():
                raise InputError(f"--resume {path}: no such training state")
            if path.parent.resolve() != folder.resolve() and newest_state(folder):
                raise InputError(f"--resume {path}: {folder} has states of its own; take another --out")
        folder.mkdir(parents=True, exist_ok=True)
        for state in folder.glob("step-*"):
            later = resume not in ("auto", "never") and state.name > path.name      # of the run that is left now
            if resume == "never" or state.suffix == ".partial" or later:
                shutil.rmtree(state)
        if resume == "never":
            path = None
            (folder / "log.jsonl").unlink(missing_ok=True)
        elif resume == "auto":
            path = newest_state(folder)
            if path:
                check_recipe(folder, record, "--resume never")
        check_room(folder, model, keep)
        (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
        if stage == 0:
            write_toy_tokenizer(folder / "tokenizer.model")
        return path
    except OSError as error:
        raise InputError(f"--out {folder.parent}: {error.strerror}") from None


def open_log(path: Path):
    """log.jsonl, to be continued, a line at once; one that a kill has cut off is taken away."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        ours = isinstance(error, (InputError, OSError, SafetensorError))        # OSError: a disk is full
        print(f"eval.py: {error}" if ours else traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(2 if ours else 1)      # at once: other ranks may be waiting for this one
