"""Answer questions about documents, and score the answers: the paper's Tables 1, 2 and 3.

    python eval.py                                      # the shipped model reads 200 drawn pages
    python eval.py --checkpoint out/toy/stage3 --benchmark toy          # the toy, its own pages
    python eval.py --benchmark DocVQA=LMUData/DocVQA_VAL.tsv \\
        WTQ=DocDownstream-1.0/test/WikiTableQuestions_test.jsonl
    torchrun --nproc_per_node 8 eval.py --checkpoint out/1b/stage3 --benchmark ChartQA_TEST.tsv
    python eval.py --noise-relative 0.5 1 2             # again with noise, in units of F's spread
    python eval.py --vocab 50                           # which tokens P_vocab takes (section 5.3)
    python eval.py --score out/toy/stage3/eval/toy.jsonl        # predictions again, without a model

Predictions go to OUT/BENCHMARK.jsonl. The same command goes on where it was interrupted, on any
number of processes. paper/benchmarks.py says which files are read, paper/metrics.py how answers are
scored.
"""
import argparse
import json
import math
import zlib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import READ, Tokenizer
from model import AlignVLM
from paper.benchmarks import READERS, Benchmark, open_benchmark
from paper.metrics import METRICS, exact_match
from paper.noise import STD_PAGES, feature_std, noise_on
from paper.patch_tokens import refuse_foreign_report, summary_line, vocab_report
from paper.predictions import begin_predictions, join_predictions
from paper.tables import (check_scores, headline, refuse_foreign_table, score_files, show,
                          with_nan)
from plumbing import fast
from plumbing.files import refuse_inputs, write_text
from plumbing.logs import open_log
from plumbing.processes import name_stalled_rank, on_first_rank, run_main, start_processes
from plumbing.runs import claim
from plumbing.settings import SEVERAL, InputError, a_path, read_json, tile_limit
from plumbing.texts import edit_distance
from plumbing.weights import model_folder
from sample import SHIPPED, answer
from toy.pages import draw, held_out_documents
from vision import tile, tile_boxes

PAGES_AT_ONCE = 50
# Ranks wait so long for one with longer answers, or for the first one, which scores.
TIMEOUT = timedelta(hours=2)

# -------------------------------------------------------------------------------------------------
# The toy's pages that no training has seen


def held_out_scores(model: AlignVLM, tokenizer: Tokenizer, n: int, seed: int) -> dict[str, dict]:
    """Read n held-out pages aloud and answer one question about each, greedily.

    Returns exact_match (of answers), cer (edit distance over reference characters) and n: of each
    kind of page, of pages of one and of several tiles, and last of all "held-out" ones.
    """
    documents = held_out_documents(n, seed)
    right, errors, characters, count = Counter(), Counter(), Counter(), Counter()
    for first in tqdm(range(0, n, PAGES_AT_ONCE), desc="reading held-out pages"):
        some = documents[first:first + PAGES_AT_ONCE]
        images = [draw(page) for page, _, _ in some]
        prompts = [prompt for _, prompt, _ in some]
        *_, texts = answer(model, tokenizer, images, [READ] * len(some))
        *_, answers = answer(model, tokenizer, images, prompts)
        for (page, _, gold), text, prediction in zip(some, texts, answers):
            size = "several tiles" if page.large else "one tile"
            for group in (page.kind, size, "held-out"):
                right[group] += exact_match(prediction, [gold])
                errors[group] += edit_distance(text, page.text)
                characters[group] += len(page.text)
                count[group] += 1
    groups = [*sorted(set(count) - {"held-out"}), "held-out"]
    return {group: {"exact_match": right[group] / count[group],
                    "cer": errors[group] / characters[group], "n": count[group]}
            for group in groups}


def report(folder: Path, n: int, seed: int, device: torch.device) -> None:
    """Score a trained toy: held_out.json in its folder, and a line for each kind of page."""
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    fast.use(model, inference=True)
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    scores = held_out_scores(model, tokenizer, n, seed)
    write_text(folder / "held_out.json", json.dumps(scores, indent=2) + "\n")
    for group, s in scores.items():
        print(f"{group}: exact_match={s['exact_match']:.3f} cer={s['cer']:.3f} n={s['n']}")


# -------------------------------------------------------------------------------------------------
# The paper's benchmarks: predictions, OUT/BENCHMARK.jsonl, and what they score


def evaluate_benchmark(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, weights: int,
                       args: argparse.Namespace) -> tuple[dict, dict, dict, list[dict]]:
    """A benchmark's scores by name, their 95 % intervals, of how many samples they are, and those
    with noise.

    weights: the model's fingerprint. Predictions go to files in args.out. On all ranks but the
    first all are empty.
    """
    benchmark = replace(benchmark, rows=benchmark.rows[:args.limit],
                        prompts=benchmark.prompts[:args.limit])
    settings = {"weights": weights, "benchmark": benchmark.name, "limit": args.limit,
                "max_new_tokens": args.max_new_tokens or longest_answer(benchmark.name),
                "max_tiles": args.max_tiles or model.config.vision.max_tiles, "noise": 0.0}
    stem = str(args.out / benchmark.name)
    rows = predict(model, tokenizer, benchmark, stem, settings, args.batch_size)
    metric = METRICS[benchmark.name]
    scores = metric(rows) if rows else {}
    intervals = metric.intervals(rows) if rows else {}
    samples = metric.samples(rows) if rows else {}
    noise = evaluate_with_noise(model, tokenizer, benchmark, settings, args)
    return scores, intervals, samples, noise


def longest_answer(benchmark: str) -> int:
    """In tokens, which are the reader's characters: a page of print is read aloud."""
    if benchmark == "reader-a4":
        return 3000
    return 1500 if benchmark in READERS else 256


def evaluate_with_noise(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark,
                        settings: dict, args: argparse.Namespace) -> list[dict]:
    """Of each standard deviation that --noise or --noise-relative gives: the headline score.

    Beside it stand sigma, std_F and the cosine_distance of the connector's output.
    """
    unit, std = "", 1.0
    if args.noise_relative:
        unit = "std"
        pages = (benchmark.images(i) for i in range(min(STD_PAGES, len(benchmark.rows))))
        std = feature_std(model, pages, args.max_tiles)
    runs = []
    for given in args.noise or args.noise_relative or []:
        stem = f"{args.out / benchmark.name}.noise-{given:g}{unit}"
        sigma = float(f"{given * std:.6g}")
        noisy = {**settings, "noise": sigma}
        rows = predict(model, tokenizer, benchmark, stem, noisy, args.batch_size)
        if rows:
            measured = read_json(Path(f"{stem}.settings.json"))["measured"]
            metric = METRICS[benchmark.name]
            interval = next(iter(metric.intervals(rows).values()))
            runs.append({"sigma": sigma, **measured, "score": headline(metric(rows)),
                         "interval": interval})
    return runs


def predict(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, stem: str, settings: dict,
            batch_size: int) -> list[dict]:
    """Answer a benchmark's questions, greedily -> its rows, each with a prediction.

    Every rank calls this. It answers every world-th of the samples that are left, and writes each
    batch's answers to its own STEM.rankR. The first one joins the files to STEM.jsonl, in the
    benchmark's order, and returns the rows; the others return none.

    settings: max_new_tokens, max_tiles and noise (sigma), and what else must be the same for
    predictions to be continued. Raises InputError.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    n = len(benchmark.rows)
    questions = json.dumps([benchmark.rows, benchmark.prompts]).encode()
    settings = {**settings, "samples": n, "questions": zlib.crc32(questions)}
    done = on_first_rank(lambda: begin_predictions(stem, settings, n))
    left = [i for i in range(n) if i not in done]
    mine = left[rank::world]
    if mine:
        answer_samples(model, tokenizer, benchmark, mine, stem, settings, batch_size)
    dist.barrier()
    return join_predictions(benchmark, stem, settings) if rank == 0 else []


def answer_samples(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, samples: list[int],
                   stem: str, settings: dict, batch_size: int) -> None:
    """Answer some of a benchmark's samples: a line of this rank's STEM.rankR for each."""
    rank = dist.get_rank()
    with (open_log(Path(f"{stem}.rank{rank}")) as file,
          noise_on(model, settings["noise"]) as noise,
          tqdm(total=len(samples), desc=Path(stem).name, disable=rank > 0) as bar):
        for first in range(0, len(samples), batch_size):
            batch = samples[first:first + batch_size]
            images = [benchmark.images(i) for i in batch]
            prompts = [benchmark.prompts[i] for i in batch]
            if noise:
                noise.samples = [
                    (f"{benchmark.name}/{benchmark.rows[i]['index']}",
                     count_tiles(model, pages, settings["max_tiles"]))
                    for i, pages in zip(batch, images)]
            *_, texts = answer(model, tokenizer, images, prompts, settings["max_tiles"],
                               max_new_tokens=settings["max_new_tokens"])
            measured = noise.measured if noise else [None] * len(batch)
            for i, text, of_sample in zip(batch, texts, measured):
                line = {"sample": i, "prediction": text, "measured": of_sample}
                file.write(json.dumps(line) + "\n")
            bar.update(len(batch))


def count_tiles(model: AlignVLM, pages: list[Image.Image], max_tiles: int) -> int:
    return sum(len(tile_boxes(*page.size, model.config.vision, max_tiles)) for page in pages)


def fingerprint(model: AlignVLM) -> int:
    """What tells one training from another: a checksum of one to two thousand numbers of each
    tensor, or of all that it has."""
    crc = 0
    for name, p in model.state_dict().items():
        step = max(1, p.numel() // 1000)
        some = p.flatten()[::step].float().cpu()
        crc = zlib.crc32(some.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc


# -------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--benchmark", **SEVERAL, metavar="[NAME=]PATH",
        help="benchmarks as VLMEvalKit (TSV), DocDownstream (JSONL) or VCR-wiki (parquet) have "
        f"them; pages of print: {', '.join(READERS)}; the toy's pages, 200 or as many as one "
        "likes: toy, toy=N (default: reader-drawn)")
    add("--checkpoint", help="model folder, or a name on the hub, `owner/name` "
        "(default: the shipped model, reader/stage3)")
    add("--out", type=a_path, help="where predictions, table.md and scores.json go (default: "
        "CHECKPOINT/eval; out/owner/name/eval for a name on the hub, out/shipped/eval for the "
        "shipped model)")
    add("--score", **SEVERAL, metavar="[NAME=]FILE", help="only score files of predictions again")
    add("--vocab", type=int, metavar="N", help="only average P_vocab over the first N samples' "
        "pages (a page of two samples counts twice), into OUT/vocab.png and vocab.json (needs `pip "
        "install matplotlib`)")
    add("--limit", type=int, metavar="N", help="the first N samples of each benchmark (default: "
        "all)")
    add("--batch-size", type=int, default=16, help="samples answered together by a process "
        "(default: %(default)s)")
    add("--max-new-tokens", type=int, help="longest answer (default: 256; of pages of print "
        "1500, of reader-a4 3000)")
    add("--max-tiles", type=tile_limit, help="tiles a page is cut into at most (default: what the "
        "model's config.json says)")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--noise", type=float, **SEVERAL, metavar="SIGMA", help="evaluate once more "
                       "with Gaussian noise of this standard deviation on the visual features F "
                       "(the paper: 3)")
    noise.add_argument("--noise-relative", type=float, **SEVERAL, metavar="R", help="the same, in "
                       "standard deviations of F")
    args = parser.parse_args()
    numbers = args.limit, args.vocab, args.batch_size, args.max_new_tokens
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--limit, --vocab, --batch-size and --max-new-tokens are at least 1")
    if not all(0 < sigma < math.inf for sigma in args.noise or args.noise_relative or []):
        parser.error("the noise is more than 0: without any the benchmark is evaluated anyway")
    noisy = args.noise or args.noise_relative
    asked = (args.benchmark, args.checkpoint, args.limit, args.vocab, noisy, args.max_tiles,
             args.max_new_tokens)
    if args.score and any(asked):
        parser.error("--score takes predictions as they are: only --out goes with it")
    if args.vocab and (args.limit or noisy):
        parser.error("--vocab N takes the first N samples: without --limit and --noise")
    args.benchmark = args.benchmark or ["reader-drawn"]
    args.checkpoint = args.checkpoint or SHIPPED
    return args


def default_out(model: str | Path) -> Path:
    """Where a model's scores go: into its folder, but nothing is written into the shipped model, or
    into the hub's cache."""
    folder = Path(model)
    if not folder.exists():
        return Path("out", model, "eval")
    if folder.resolve() == SHIPPED.resolve():
        return Path("out", "shipped", "eval")
    return folder / "eval"


def refuse_benchmarks(benchmarks: list[Benchmark], out: Path) -> None:
    """Raise InputError if a file that goes to `out` would be written over a benchmark's."""
    read = [benchmark.path for benchmark in benchmarks if benchmark.path]
    read += [file for path in read if path.is_dir() for file in path.iterdir()]
    written = ["table.md", "scores.json", "vocab.png", "vocab.json"]
    for benchmark in benchmarks:
        written += [f"{benchmark.name}.jsonl", f"{benchmark.name}.settings.json"]
        written += [path.name for path in out.glob(f"{benchmark.name}.*")       # noise's, ranks'
                    if path.is_file()]
    for name in written:
        refuse_inputs(out / name, read)


def earlier_results(path: Path, weights: int) -> dict[str, dict]:
    """The scores and noise that a scores.json has of this model's other benchmarks.

    The table is of all that was measured. Raises InputError for those of another model.
    """
    if not path.exists():
        refuse_foreign_table(path.parent)
        return {"scores": {}, "intervals": {}, "samples": {}, "noise": {}}
    before = read_json(path)
    if before.get("weights") != weights:
        raise InputError(f"{path}: scores of another model: take another --out")
    parts = {key: with_nan(before.get(key)) for key in ("scores", "intervals", "noise")}
    parts["samples"] = before.get("samples", {})        # an older file has none
    check_scores(parts, path)
    return parts


def report_vocab(model: AlignVLM, tokenizer: Tokenizer, benchmarks: list[Benchmark],
                 args: argparse.Namespace) -> None:
    """--vocab: a picture of P_vocab over the first samples' pages, and a line about it."""
    samples = [(benchmark, i) for benchmark in benchmarks for i in range(len(benchmark.rows))]
    pages = (tile(page, model.config.vision, args.max_tiles)
             for benchmark, i in samples[:args.vocab] for page in benchmark.images(i))
    found = vocab_report(model, tokenizer, pages, args.out / "vocab.png")
    print(summary_line(found, args.out))


def main() -> None:
    args = parse_args()
    if args.score:
        score_files(args.score, args.out)
        return
    benchmarks = [open_benchmark(spec) for spec in args.benchmark]
    if len({benchmark.name for benchmark in benchmarks}) < len(benchmarks):
        raise InputError(f"--benchmark {' '.join(args.benchmark)}: one file for each benchmark")
    folder = model_folder(args.checkpoint)
    args.out = args.out or default_out(args.checkpoint)
    refuse_benchmarks(benchmarks, args.out)
    if args.vocab:
        refuse_foreign_report(args.out / "vocab.png")
    device = start_processes(TIMEOUT)
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    on_first_rank(lambda: claim(args.out))
    weights = fingerprint(model)            # before they are laid out anew
    fast.use(model, inference=True)
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    if args.vocab:
        if dist.get_rank() == 0:
            report_vocab(model, tokenizer, benchmarks, args)
        return
    results = {"model": str(args.checkpoint), "weights": weights,
               **earlier_results(args.out / "scores.json", weights)}
    with name_stalled_rank(TIMEOUT):
        for benchmark in benchmarks:
            scores, intervals, samples, noise = evaluate_benchmark(model, tokenizer, benchmark,
                                                                   weights, args)
            results["scores"][benchmark.name] = scores
            results["intervals"][benchmark.name] = intervals
            results["samples"][benchmark.name] = samples
            if noise:
                runs = [*results["noise"].get(benchmark.name, []), *noise]
                last = {run["sigma"]: run for run in runs}
                results["noise"][benchmark.name] = list(last.values())
        if dist.get_rank() == 0:
            show(results, args.out)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
