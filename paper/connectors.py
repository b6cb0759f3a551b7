"""Tables 2 and 3 at the toy's scale: four connectors between the same backbones, on the same data.

    python -m paper.connectors                              # three seeds of each
    python -m paper.connectors --connectors align mlp --seeds 1

The paper starts from a released SigLIP and a released Llama. Here the LLM is toy/stage0's. Its
encoder is first taught to name the character in every patch through a linear layer that is then
thrown away (Align without LayerNorms, and so in its favour). After that each connector goes through
the three stages of train.py. Then eval.py asks it about pages that it has not seen, without and
with noise on the features F. What is done already is not done again: the same command goes on.
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
from paper.tables import TABLE_1, TABLE_3
from plumbing import fast
from plumbing.files import write_text
from plumbing.logs import read_log
from plumbing.processes import run_main
from plumbing.settings import InputError, a_path
from toy.pages import KINDS, STAGE0, draw, drawn_page, eye_chart, plain_text
from vision import tile

ROOT = Path(__file__).resolve().parent.parent
BACKBONE_STEPS = 300
STEPS = {1: 80, 2: 60, 3: 100}              # by stage
BATCH = 16                                  # pages a step
EVERY = 25                                  # steps of stage 3 between looks at held-out questions
NOISE = [0.5, 1.0, 2.0]                     # standard deviations of F
# In the paper's tables.
NAMES = {"align": "ALIGN", "mlp": "MLP", "perceiver": "Perceiver", "ovis": "Ovis"}

# -------------------------------------------------------------------------------------------------
# The backbones


def patch_token_ids(rng: random.Random, model: AlignVLM,
                    tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """A drawn page -> its tiles (T, 3, S, S), and the token (T, N) in each patch, or a space."""
    if rng.random() < 0.5:
        page = eye_chart(rng)
    else:
        page = drawn_page(rng, rng.choice(KINDS), rng.random() < 0.3, "train")
    pixels = tile(draw(page), model.config.vision)                              # (T, 3, S, S)
    text = plain_text(page, model.config.vision)
    ids = [tokenizer.encode(character)[0] for character in text]
    return pixels, torch.tensor(ids).view(len(pixels), -1)


def make_backbones(folder: Path) -> None:
    """The LLM of toy/stage0, and an encoder that can name what stands in its patches.

    They are saved in a folder like that of stage 0.
    """
    if (folder / "config.json").exists():
        return
    model = AlignVLM.from_pretrained(STAGE0, torch.float32)
    fast.use(model)
    tokenizer = Tokenizer(STAGE0, model.config.llm.vocab_size)
    torch.manual_seed(0)
    rng = random.Random("backbones")
    readout = nn.Linear(model.config.vision.hidden_size, len(tokenizer))
    params = [*model.vision.parameters(), *readout.parameters()]
    # The schedule sets the rate, up to 2e-3 and down to 0, and beta1, 0.95 to 0.85 and back.
    optimizer = torch.optim.AdamW(params, betas=(0.95, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=BACKBONE_STEPS,
                                                   pct_start=0.1)
    bar = tqdm(range(BACKBONE_STEPS), desc="backbones")
    for _ in bar:
        pages = [patch_token_ids(rng, model, tokenizer) for _ in range(BATCH)]
        pixels = torch.cat([tiles for tiles, _ in pages])                       # (T, 3, S, S)
        ids = torch.cat([ids for _, ids in pages])                              # (T, N)
        logits = readout(model.vision(pixels))                                  # (T, N, V)
        loss = nnf.cross_entropy(logits.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    model.save_pretrained(folder, tokenizer.path, torch.float32)


# -------------------------------------------------------------------------------------------------
# A connector's run


def run(*command) -> None:
    """One of the repository's commands; what it prints is shown. Raises InputError if it fails."""
    command = [str(part) for part in command]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()              # it saves its state
        raise
    if status:
        raise InputError(f"`{' '.join(command)}` has failed: the same command goes on when that is "
                         "mended")


def train_and_ask(kind: str, seed: int, backbones: Path, out: Path, documents: int) -> dict:
    """The three stages with one connector, then its questions -> what result_of says of the run.

    `out` is the run's folder. Raises KeyboardInterrupt if a stage was asked to stop.
    """
    if not (out / "stage0").exists():
        shutil.copytree(backbones, out / "stage0.partial", dirs_exist_ok=True)
        (out / "stage0.partial").rename(out / "stage0")
    for stage, steps in STEPS.items():
        every = EVERY if stage == 3 else steps
        run("train.py", "--stage", stage, "--connector", kind, "--seed", seed, "--steps", steps,
            "--batch-size", BATCH, "--out", out, "--eval-every", every, "--held-out", 50)
        if not (out / f"stage{stage}" / "config.json").exists():
            raise KeyboardInterrupt
    run("eval.py", "--checkpoint", out / "stage3", "--benchmark", f"toy={documents}",
        "--batch-size", 50, "--max-new-tokens", 24, "--noise-relative", *NOISE,
        "--out", out / "eval")
    return result_of(out)


def result_of(out: Path) -> dict:
    """What the table says of a run, from its folder."""
    results = json.loads((out / "eval" / "scores.json").read_text())
    exact_match = next(iter(results["scores"]["toy"].values()))
    model = AlignVLM.from_pretrained(out / "stage3")
    reached, seconds, samples_before = [], 0.0, 0
    for stage, steps in STEPS.items():
        for row in read_log(out / f"stage{stage}" / "log.jsonl"):
            if row.get("exact_match", 0) >= 0.9:
                reached.append(samples_before + BATCH * (row["step"] + 1))
            if "images_per_s" in row:       # the toy's samples have one image each
                seconds += BATCH / row["images_per_s"]
        samples_before += BATCH * steps
    return {"exact_match": 100 * exact_match, "noise": results["noise"]["toy"],
            "samples_to_90": min(reached, default=None),
            "parameters": sum(p.numel() for p in model.connector.parameters()),
            "seconds": seconds}


# -------------------------------------------------------------------------------------------------
# The table


def mean_and_range(values: list[float], digits: int = 1) -> str:
    """Their mean, and from where to where they go."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


def table(runs: dict[str, list[dict]]) -> str:
    """The runs of each connector as a markdown table, with the paper's figures beside them."""
    names = [f"{sigma:g} std(F)" for sigma in NOISE]
    header = ["connector", "exact match, %", *(f"with noise, {name}" for name in names),
              f"cosine distance, {names[-1]}", "samples to 90 %", "parameters", "training, s",
              "paper: average", "paper: noise"]
    lines = [header, ["---"] * len(header)]
    for kind, some in runs.items():
        lines.append([kind, *table_cells(some), *paper_cells(kind)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_cells(runs: list[dict]) -> list[str]:
    """What was measured of a connector, over its runs."""
    noisy = []
    for i in range(len(NOISE)):
        noisy.append(mean_and_range([run["noise"][i]["score"] for run in runs]))
    distances = [run["noise"][-1]["cosine_distance"] for run in runs]
    reached = [f"{run['samples_to_90']:,}" if run["samples_to_90"] is not None else "never"
               for run in runs]
    return [mean_and_range([run["exact_match"] for run in runs]), *noisy,
            f"{sum(distances) / len(distances):.4f}", ", ".join(reached),
            f"{runs[0]['parameters']:,}", mean_and_range([run["seconds"] for run in runs], 0)]


def paper_cells(kind: str) -> list[str]:
    """The paper's average of nine benchmarks, and what noise changes."""
    name = f"{NAMES[kind]}, Llama-3.2-3B"
    average = f"{TABLE_1[name][-1]:.2f}"
    if name not in TABLE_3:
        return [average, ""]
    without, with_noise, _ = TABLE_3[name]
    return [average, f"{with_noise - without:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.connectors", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--connectors", nargs="+", choices=CONNECTORS, default=CONNECTORS,
        help="which (default: all four)")
    add("--seeds", type=int, default=3,
        help="runs of each, with seeds 0, 1, ... (default: %(default)s)")
    add("--documents", type=int, default=100,
        help="held-out pages in the end (default: %(default)s)")
    add("--out", type=a_path, default=Path("out/connectors"), help="default: %(default)s")
    args = parser.parse_args()
    if min(args.seeds, args.documents) < 1:
        parser.error("--seeds and --documents are at least 1")
    out = args.out.resolve()
    make_backbones(out / "backbones")
    runs: dict[str, list[dict]] = {}
    for seed in range(args.seeds):          # a seed of each first: a table is there early
        for kind in args.connectors:
            result = train_and_ask(kind, seed, out / "backbones", out / f"{kind}-{seed}",
                                   args.documents)
            runs.setdefault(kind, []).append(result)
            write_text(out / "table.json", json.dumps(runs, indent=2) + "\n")
            write_text(out / "table.md", table(runs))
    print(f"\n{table(runs)}\nin {out}/table.md")


if __name__ == "__main__":
    run_main(main)
