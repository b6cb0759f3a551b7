"""Answer questions about documents, and score the answers: the paper's Tables 1, 2 and 3.

    python eval.py                                              # the newest model reads 200 drawn documents
    python eval.py --benchmark DocVQA=LMUData/DocVQA_VAL.tsv WTQ=DocDownstream-1.0/test/WikiTableQuestions_test.jsonl
    torchrun --nproc_per_node 8 eval.py --checkpoint out/llama-3.2-1b/stage3 --benchmark LMUData/ChartQA_TEST.tsv
    python eval.py --noise-relative 0.5 1 2                     # once more with noise on F, in standard deviations of F
    python eval.py --vocab 50                                   # which words P_vocab takes on 50 pages (section 5.3)
    python eval.py --score out/toy/stage3/eval/toy.jsonl        # scores predictions again, without a model

Predictions go to OUT/BENCHMARK.jsonl. The same command goes on where it was interrupted, on any number of processes.
paper/benchmarks.py says which files are read, paper/metrics.py how answers are scored.
"""
import argparse
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import READ, Tokenizer, prepare
from plumbing.examples import Example, Turn
from model import IMAGE, AlignVLM
from paper.benchmarks import TOYS, Benchmark, open_benchmark
from paper.metrics import METRICS, edit_distance
from paper.noise import STD_PAGES, feature_std, noise_on
from paper.predictions import begin_predictions, join_predictions
from paper.tables import check_scores, headline, score_files, show
from paper.words import summary_line, vocab_report
from plumbing.logs import open_log
from plumbing.processes import roll_call, run_main, start_processes
from plumbing.runs import IN_THE_BOX
from plumbing.settings import InputError, read_json
from sample import answer, default_model
from toy.looks import draw
from toy.pages import KINDS, PAGES, held_out_documents
from vision import tile, tile_boxes


def held_out_scores(model: AlignVLM, tokenizer: Tokenizer, n: int, seed: int, look: str = "clean") -> dict[str, dict]:
    """Read n held-out documents aloud and answer one question about each, greedily, 50 at a time.

    Returns exact_match (of answers), cer (edit distance over reference characters) and n, of each kind of page, of
    pages of one and of several tiles, and last of all "held-out" ones.
    """
    documents = held_out_documents(n, seed, list(PAGES) if look == "hard" else KINDS)      # what it has learnt
    right, errors, characters, count = (Counter() for _ in range(4))
    for first in tqdm(range(0, n, 50), desc="reading held-out pages"):
        some = documents[first:first + 50]
        images = [draw(page, look) for page, _, _ in some]
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


def report(folder: Path, n: int, seed: int, look: str, device: torch.device) -> None:
    """Score a trained toy: held_out.json in its folder, and a line for each kind of page."""
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    model.llm.pack()
    scores = held_out_scores(model, Tokenizer(folder, model.config.llm.vocab_size), n, seed, look)
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


def evaluate(model: AlignVLM, tokenizer: Tokenizer, benchmark: Benchmark, weights: int,
             args) -> tuple[dict, list[dict]]:
    """A benchmark's scores by name, and, for each of --noise, sigma, std_F, cosine_distance and the headline score.

    weights: the model's fingerprint.
    """
    settings = {"weights": weights, "benchmark": benchmark.name, "limit": args.limit,
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--benchmark", nargs="+", default=["toy"], metavar="[NAME=]PATH", help="benchmarks as VLMEvalKit (TSV), "
        "DocDownstream (JSONL) or VCR-wiki (parquet) have them; drawn documents, 200 or as many as one likes: "
        f"{', '.join(TOYS)}, toy=N (default: toy)")
    add("--checkpoint", type=Path, help="model folder (default: the newest under out/, or else the one in the box)")
    add("--out", type=Path, help="where predictions, table.md and scores.json go (default: CHECKPOINT/eval, and "
        "out/box/eval for the model in the box)")
    add("--score", nargs="+", metavar="[NAME=]FILE", help="only score files of predictions again")
    add("--vocab", type=int, metavar="N", help="only average P_vocab over the first N samples' pages, into "
        "OUT/vocab.png and vocab.json (needs `pip install matplotlib`)")
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


def main() -> None:
    args = parse_args()
    if args.score:
        return score_files(args.score, args.out)
    benchmarks = [open_benchmark(spec) for spec in args.benchmark]
    if len({benchmark.name for benchmark in benchmarks}) < len(benchmarks):
        raise InputError(f"--benchmark {' '.join(args.benchmark)}: one file for each benchmark")
    folder = args.checkpoint or default_model()
    args.out = args.out or (Path("out", "box") if folder.resolve().parent == IN_THE_BOX.resolve() else folder) / "eval"
    timeout = timedelta(hours=2)        # of ranks that wait for one with longer answers, or for the first to score
    device, _ = start_processes(timeout)
    model = AlignVLM.from_pretrained(folder, device=device).eval()
    weights = fingerprint(model)
    model.llm.pack()
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    if args.vocab:
        files = [(b, i) for b in benchmarks for i in range(len(b.rows))][:args.vocab]
        pages = (tile(page, model.config.vision, args.max_tiles) for b, i in files for page in b.images(i))
        args.out.mkdir(parents=True, exist_ok=True)
        return print(summary_line(vocab_report(model, tokenizer, pages, args.out / "vocab.png"), args.out))
    results = {"model": str(folder), "weights": weights, "scores": {}, "noise": {}}
    if (args.out / "scores.json").exists():     # of other benchmarks: the table is of all that was measured
        before = read_json(args.out / "scores.json")
        if before.get("weights") != results["weights"]:
            raise InputError(f"{args.out / 'scores.json'}: scores of another model: take another --out")
        check_scores(before, args.out / "scores.json")
        results |= {key: before[key] for key in ("scores", "noise") if key in before}
    with roll_call(timeout):
        for benchmark in benchmarks:
            scores, noise = evaluate(model, tokenizer, benchmark, weights, args)
            results["scores"][benchmark.name] = scores
            if noise:
                noise = {run["sigma"]: run for run in [*results["noise"].get(benchmark.name, []), *noise]}
                results["noise"][benchmark.name] = list(noise.values())
        if dist.get_rank() == 0:
            show(results, args.out)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
