"""Tables 2 and 3 at the toy's scale: four connectors between the same backbones, on the same data in the same order.

    python -m paper.connectors                              # three seeds of each
    python -m paper.connectors --connectors align mlp --seeds 1

The paper starts from a released SigLIP and a released Llama. The toy's LLM is the one in the box; its encoder is first
taught to name the character in every patch through a linear layer that is then thrown away (Align without LayerNorms,
and so in its favour). After that each connector goes through the three stages of train.py, and eval.py asks it about
pages that it has not seen, without and with noise on the features F. What is done already is not done again: the same
command goes on.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from tqdm import tqdm

from connector import CONNECTORS
from data import Tokenizer
from model import AlignVLM
from plumbing.logs import read_log
from plumbing.settings import InputError
from toy.looks import draw
from toy.pages import KINDS, STAGE0, drawn_page, eye_chart, plain_text
from vision import tile

ROOT = Path(__file__).resolve().parent.parent
STEPS = {1: 80, 2: 60, 3: 100}              # by stage
BATCH = 16                                  # pages a step
EVERY = 25                                  # steps of stage 3 between looks at the held-out questions
NOISE = [0.5, 1.0, 2.0]                     # standard deviations of F
PAPER = {"align": (58.81, -1.67), "mlp": (53.06, -25.54), "perceiver": (50.68, None), "ovis": (54.72, None)}


def patch_words(rng: random.Random, model: AlignVLM, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """A drawn page -> its tiles (T, 3, S, S), and the word (T, N) that stands in each patch, or else a space."""
    page = eye_chart(rng) if rng.random() < 0.5 else drawn_page(rng, rng.choice(KINDS), rng.random() < 0.3, "train")
    pixels = tile(draw(page), model.config.vision)
    words = [tokenizer.encode(character)[0] for character in plain_text(page, model.config.vision)]
    return pixels, torch.tensor(words).view(len(pixels), -1)


def make_backbones(folder: Path, steps: int = 300) -> None:
    """The LLM in the box, and an encoder that can name what stands in its patches: a folder like that of stage 0."""
    if (folder / "config.json").exists():
        return
    box = STAGE0
    model = AlignVLM.from_pretrained(box, torch.float32)
    tokenizer = Tokenizer(box, model.config.llm.vocab_size)
    torch.manual_seed(0)
    rng, readout = random.Random("backbones"), nn.Linear(model.config.vision.hidden_size, len(tokenizer))
    params = [*model.vision.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="backbones")):
        pixels, words = map(torch.cat, zip(*(patch_words(rng, model, tokenizer) for _ in range(BATCH))))
        logits = readout(model.vision(pixels))                                      # (T, N, V)
        loss = nnf.cross_entropy(logits.flatten(0, 1), words.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    model.save_pretrained(folder, tokenizer.path, torch.float32)


def run(*command) -> None:
    """One of the repository's commands; what it prints is shown. Raises InputError if it fails."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()              # it saves its state
        raise
    if status:
        raise InputError(f"`{' '.join(map(str, command))}` has failed: the same command goes on when that is mended")


def train_and_ask(kind: str, seed: int, backbones: Path, out: Path, documents: int) -> dict:
    """The three stages with one connector, then its questions -> what the table says of this run."""
    if not (out / "stage0").exists():
        shutil.copytree(backbones, out / "stage0.partial", dirs_exist_ok=True)
        (out / "stage0.partial").rename(out / "stage0")
    for stage, steps in STEPS.items():
        run("train.py", "--stage", stage, "--connector", kind, "--seed", seed, "--steps", steps, "--batch-size", BATCH,
            "--out", out, "--eval-every", EVERY if stage == 3 else steps, "--held-out", 50)
        if not (out / f"stage{stage}" / "config.json").exists():        # it was asked to stop
            raise KeyboardInterrupt
    run("eval.py", "--checkpoint", out / "stage3", "--benchmark", f"toy={documents}", "--batch-size", 50,
        "--max-new-tokens", 24, "--noise-relative", *NOISE, "--out", out / "eval")
    results = json.loads((out / "eval" / "scores.json").read_text())
    logs = {stage: read_log(out / f"stage{stage}" / "log.jsonl") for stage in STEPS}
    samples = {stage: BATCH * sum(STEPS[s] for s in STEPS if s < stage) for stage in STEPS}      # before the stage
    reached = [samples[row["stage"]] + BATCH * (row["step"] + 1)
               for rows in logs.values() for row in rows if row.get("exact_match", 0) >= 0.9]
    model = AlignVLM.from_pretrained(out / "stage3")
    return {"exact_match": 100 * next(iter(results["scores"]["toy"].values())),
            "noise": results["noise"]["toy"], "samples_to_90": min(reached, default=None),
            "parameters": sum(p.numel() for p in model.connector.parameters()),
            "seconds": sum(BATCH / row["images_per_s"]          # the toy's samples have one image each
                           for rows in logs.values() for row in rows if "images_per_s" in row)}


def mean_and_range(values: list[float], digits: int = 1) -> str:
    """Their mean, and from where to where they go."""
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(runs: dict[str, list[dict]]) -> str:
    """The runs of each connector as a markdown table, with the paper's figures beside them."""
    names = [f"{sigma:g} std(F)" for sigma in NOISE]
    header = ["connector", "exact match, %", *(f"with noise, {name}" for name in names),
              f"cosine distance, {names[-1]}", "samples to 90 %", "parameters", "training, s", "paper: average",
              "paper: noise"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for kind, some in runs.items():
        noisy = [mean_and_range([run["noise"][i]["score"] for run in some]) for i in range(len(NOISE))]
        far = sum(run["noise"][-1]["cosine_distance"] for run in some) / len(some)
        reached = ", ".join("never" if run["samples_to_90"] is None else f"{run['samples_to_90']:,}" for run in some)
        average, loss = PAPER[kind]
        right = mean_and_range([run["exact_match"] for run in some])
        lines.append(f"| {kind} | {right} | {' | '.join(noisy)} | {far:.4f} | "
                     f"{reached} | {some[0]['parameters']:,} | {mean_and_range([run['seconds'] for run in some], 0)} | "
                     f"{average} | {'' if loss is None else loss} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--connectors", nargs="+", choices=CONNECTORS, default=CONNECTORS, help="which (default: all four)")
    add("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ... (default: %(default)s)")
    add("--documents", type=int, default=100, help="held-out pages in the end (default: %(default)s)")
    add("--out", type=Path, default=Path("out/connectors"), help="default: %(default)s")
    args = parser.parse_args()
    if min(args.seeds, args.documents) < 1:
        parser.error("--seeds and --documents are at least 1")
    args.out = args.out.resolve()
    make_backbones(args.out / "backbones")
    runs: dict[str, list[dict]] = {}
    for seed in range(args.seeds):          # a seed of each first: a table is there early
        for kind in args.connectors:
            result = train_and_ask(kind, seed, args.out / "backbones", args.out / f"{kind}-{seed}", args.documents)
            runs.setdefault(kind, []).append(result)
            (args.out / "table.json").write_text(json.dumps(runs, indent=2) + "\n")
            (args.out / "table.md").write_text(table(runs))
    print(f"\n{table(runs)}\nin {args.out}/table.md")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"paper/connectors.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
