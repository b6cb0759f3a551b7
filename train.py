"""Train AlignVLM's three stages: captions, documents, instructions (paper section 3.3).

    python train.py                                     # the toy: all stages, on a laptop, in eleven minutes
    python train.py --stage 1                           # one of them; it starts from the last one's checkpoint
    torchrun --nproc_per_node 8 train.py --stage 1 --vision siglip-so400m-patch14-384 --llm Llama-3.2-1B --out out/1b \\
        --data cc12m/                                   # on 8 GPUs, from two folders with released weights

Stage 0 stands for what a released LLM brings along: the toy's own LLM learns to read pages as plain text, before it
meets an image. Every stage writes a folder OUT/stageN (config.json, model.safetensors, tokenizer.model, log.jsonl)
from which the next stage and sample.py start; one that is complete is not trained again.
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (BAD_KINDS, CELL, KINDS, READ, SYMBOLS, Bad, Documents, Example, Page, Position, Sample, Tokenizer,
                  Turn, answer, code, deal, draw, drawn_page, encode_chat, fill_rows, held_out_documents, pack, prepare,
                  rows_of, write_toy_tokenizer)
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, LLAMA_PRESETS, AlignVLM, read_llama
from vision import InputError, Settings, SigLIPConfig, tile_boxes


@dataclass
class Recipe:
    """What one stage trains, and how. The first block is the paper's (appendix A.1), the second MS-Swift's defaults."""
    trainable: tuple[str, ...]
    batch_size: int = 512               # samples a step, over all ranks
    lr: float = 1e-5
    max_length: int = 1024              # text tokens a sample
    epochs: int = 1
    row_tokens: int = 16_384            # tokens a packed row, visual ones too: a step has as many rows as it takes

    warmup: float = 0.05                # share of the steps
    final_lr: float = 0.0               # where the cosine ends, as a share of lr
    weight_decay: float = 0.1           # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0                   # of the gradient's norm

    eps: float = 1e-8
    lr_scale: dict[str, float] = field(default_factory=dict)    # by module, times lr
    steps: int | None = None            # the toy draws its documents: it has steps, not epochs


ALL, LATE = ("vision", "connector", "llm"), ("connector", "llm")    # stage 3 freezes the vision encoder
# Adam moves a word that never occurs as far as any other, and all of them the same way: with an eps of 1e-8 most of the
# toy's E_text becomes one long vector, in which the connector's mean drowns. 1e-5 holds them back.
TOY = dict(batch_size=16, row_tokens=8192, warmup=0.03, final_lr=0.1, eps=1e-5)
RECIPES = {
    "toy": {0: Recipe(("llm",), lr=1.5e-3, steps=1600, **TOY),
            1: Recipe(ALL, lr=1e-3, steps=200, lr_scale={"llm": 0.5}, **TOY),
            2: Recipe(ALL, lr=1e-3, steps=350, **TOY),
            3: Recipe(LATE, lr=5e-4, steps=470, **{**TOY, "final_lr": 0.0})},
    "llama-3.2-1b": {1: Recipe(ALL), 2: Recipe(ALL, lr=5e-5, max_length=2048),
                     3: Recipe(LATE, lr=5e-5, max_length=2048, epochs=5)},
    "llama-3.2-3b": {1: Recipe(ALL), 2: Recipe(ALL, batch_size=256, lr=5e-5, max_length=2048),
                     3: Recipe(LATE, batch_size=256, lr=5e-5, max_length=2048, epochs=5)},
    "llama-3.1-8b": {1: Recipe(ALL), 2: Recipe(ALL, batch_size=256, lr=1e-5, max_length=2048),
                     3: Recipe(LATE, batch_size=256, lr=1e-5, max_length=2048, epochs=5)},
}


# ---------------------------------------------------------------------------------------------------------------------
# What the toy learns in each stage: (page, [(prompt, answer), ...]), from its beginning (progress 0) to its end (1)


def sticker(rng: random.Random) -> Page:
    """A few words on an otherwise empty page."""
    page = Page("sticker", 8, 8)
    for row in rows_of(rng, 8, 0, rng.randint(1, 3)):
        word = code(rng, 1, 8)
        page.write(row, (rng.randint(0, 8 - len(word)), word))
    return page


def dense_text(rng: random.Random) -> Page:
    """Full lines of random words: most tokens of a transcript teach to copy."""
    page = Page("dense", 8, 8)
    for row in rows_of(rng, 8, 0, rng.randint(3, 6)):
        page.write(row, (0, code(rng, 3, 8)))
    return page


def eye_chart(rng: random.Random) -> Page:
    """Random characters all over the page, read as one line: the k-th of the answer is the k-th patch of the image.

    So the LLM can look at the right patch before it can read any, and every patch gets an error signal of its own.
    """
    page = Page("chart", 8, 8)
    cells = "".join(" " if rng.random() < 0.25 else rng.choice(SYMBOLS + "./:") for _ in range(64))
    page.words = [(row, 0, cells[8 * row:8 * row + 8]) for row in range(8)]
    page.lines = [cells]
    return page


def plain_text(page: Page, config: SigLIPConfig) -> str:
    """The page as stage 0 reads it: at the place of each visual token the character that its patch shows.

    The whole-page tile, on which nothing is legible, and the margins are spaces.
    """
    cells = [[" "] * page.columns for _ in range(page.rows)]
    for row, column, word in page.words:
        cells[row][column:column + len(word)] = word
    side, text = config.patches_per_side, ""
    for left, top, right, bottom in tile_boxes(page.columns * CELL, page.rows * CELL, config):
        if max(right - left, bottom - top) > config.image_size:
            text += " " * side * side
            continue
        x, y = (side - (right - left) // CELL) // 2, (side - (bottom - top) // CELL) // 2       # a tile is centred
        crop = ["".join(row[left // CELL:right // CELL]) for row in cells[top // CELL:bottom // CELL]]
        lines = [""] * y + [" " * x + line for line in crop]
        text += "".join(line.ljust(side) for line in lines).ljust(side * side)
    return text


def text_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 0, plain text: to copy (dense pages, and charts all along), then to read and to look things up."""
    kind, charts = rng.random(), 0.3 - 0.2 * progress
    if kind < charts:
        page = eye_chart(rng)
        return page, [("", page.text)]
    if rng.random() > 4 * progress - 0.5:               # all dense for an eighth of the stage, none after three eighths
        page = dense_text(rng)
        return page, [("", page.text)]
    if kind < charts + 0.08:
        page = sticker(rng)
        return page, [("", page.text)]
    page = drawn_page(rng, rng.choice(KINDS + ["table"]), progress > 0.25 and rng.random() < 0.45, "train")
    return page, reading_and_questions(rng, page, read=0.25, ask=0.25)


def caption_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 1: to see. Charts until every character is known in its patch, then words in free places among them."""
    page = eye_chart(rng) if progress < 0.6 or rng.random() < 0.4 else sticker(rng)
    return page, [("", page.text)]


def document_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 2: to read whole pages; those of several tiles come in over the first fifth."""
    page = drawn_page(rng, rng.choice(KINDS), rng.random() < 0.5 * min(1, 5 * progress), "train")
    return page, [(READ, page.text)]


def instruction_lesson(rng: random.Random, progress: float) -> tuple[Page, list[tuple[str, str]]]:
    """Stage 3: to answer, and not to forget reading."""
    page = drawn_page(rng, rng.choice(KINDS + ["table"]), rng.random() < 0.4, "train")
    return page, reading_and_questions(rng, page, read=0.25, ask=0.35)


def reading_and_questions(rng: random.Random, page: Page, read: float, ask: float) -> list[tuple[str, str]]:
    """The page read aloud (a share of `read`), up to three of its questions (`ask`), or, in the rest, one after the
    other: several turns cost its image once. Not the other way round: that taught less of reading at once."""
    kind, asked = rng.random(), rng.sample(page.questions, min(3, len(page.questions)))
    return ([(READ, page.text)] if kind < 1 - ask else []) + (asked if kind >= read else [])


LESSONS = [text_lesson, caption_lesson, document_lesson, instruction_lesson]


class ToyDocuments(Dataset):
    """One stage's samples: sample i depends on (seed, stage, i, n) alone, never on a rank or a worker."""

    def __init__(self, stage: int, n: int, seed: int, tokenizer: Tokenizer, config: SigLIPConfig):
        self.stage, self.n, self.seed, self.tokenizer, self.config = stage, n, seed, tokenizer, config

    def draws(self, start: Position) -> Iterator[tuple[int | None, Position]]:
        for i in range(*(start.taken or [0]), self.n):
            yield i, Position(0, [i + 1])
        yield None, Position(1)

    def __getitem__(self, index: "int | Position") -> "Sample | Position":
        if isinstance(index, Position):
            return index
        rng, progress = random.Random(f"{self.seed}/{self.stage}/{index}"), index / self.n
        page, asks = LESSONS[self.stage](rng, progress)
        images = [draw(page)] if self.stage > 0 else []
        first = IMAGE if self.stage > 0 else self.as_text(rng, page, progress)
        turns = []
        for i, (prompt, gold) in enumerate(asks):
            parts = [first] if i == 0 else []
            turns += [Turn("user", parts + [prompt] if prompt else parts), Turn("assistant", [gold])]
        sample = prepare(Example(images, turns, f"toy/{self.stage}/{index}"), self.tokenizer, self.config)
        if self.stage == 0 and page.kind == "chart" and rng.random() < 0.8:
            self.smudge(rng, sample)
        return sample

    def smudge(self, rng: random.Random, sample: Sample) -> None:
        """Overwrite a share of a text chart's characters by any words, and do not ask for these.

        An LLM that has only met legible charts finds its place by what stands there. In stage 1 nothing legible does,
        at first: it looks nowhere, and the encoder learns nothing. A smudged chart can only be read by counting places.
        Special tokens smudge as well: an untrained connector's mean over the vocabulary is mostly made of them.
        """
        cells = sample.tokens.tolist().index(self.tokenizer.special["<|end_header_id|>"]) + 2   # after "\n\n"
        answers = (sample.labels != IGNORE).nonzero()[0].item()
        share = rng.uniform(0.2, 1.0)
        for i in range(self.config.n_patches):
            if rng.random() < share:
                sample.tokens[cells + i] = rng.randrange(len(self.tokenizer))
                sample.labels[answers + i] = IGNORE

    def as_text(self, rng: random.Random, page: Page, progress: float) -> str:
        """Stage 0's page in the image's place: ever more often laid out as the patches will be, else as plain lines."""
        laid_out = {"chart": 1.0, "dense": 0.25}.get(page.kind, 0.5 + 0.5 * progress)
        return plain_text(page, self.config) if rng.random() < laid_out else page.text


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to final_lr * lr."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, recipe.steps - warmup))))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def shard(model: AlignVLM, device: torch.device) -> None:
    """FSDP2, full sharding (the paper's ZeRO-3): each block, the connector and the vision tower are gathered when they
    run; what is left, the word embedding foremost, stays gathered: connector, decoder and head share it.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*model.vision.encoder["layers"], model.vision, model.connector, *model.llm.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def blank(config: SigLIPConfig, seen: bool) -> Sample:
    """A sample without an answer, which changes nothing. It keeps ranks in step: under FSDP all of them call the same
    modules, so if any rank has an image (seen), a row without one gets a blank tile."""
    n, side = (config.n_patches, config.image_size) if seen else (1, config.image_size)
    return Sample(torch.full((n,), IMAGE if seen else 0), torch.full((n,), IGNORE),
                  torch.zeros(int(seen), 3, side, side), "blank")


def accumulate_gradients(model: AlignVLM, rows: list[list[Sample]], device: torch.device) -> tuple[float | None, int]:
    """Gradients of the mean loss over all supervised tokens of a step, on all ranks, however it is split into rows.

    Returns that loss (nats per token; None, and no gradients, if every sample was bad) and the number of tokens."""
    samples = [sample for row in rows for sample in row]
    counts = torch.tensor([sum(int((s.labels != IGNORE).sum()) for s in samples),
                           sum(len(s.tokens) for s in samples), sum(len(s.pixels) for s in samples)])
    dist.all_reduce(counts)
    supervised, n_tokens, n_tiles = counts.tolist()
    if supervised == 0:
        return None, 0
    dist.all_reduce(n_rows := torch.tensor(len(rows)), dist.ReduceOp.MAX)
    n_rows, filler = n_rows.item(), blank(model.config.vision, n_tiles > 0)
    total = torch.zeros((), device=device)
    for i in range(n_rows):
        row = rows[i] if i < len(rows) else []
        sees = n_tiles == 0 or any(len(s.pixels) for s in row)
        tokens, labels, pixels, lengths = pack(row if row and sees else [*row, filler])
        model.set_requires_gradient_sync(i == n_rows - 1)
        loss = model(tokens.to(device), labels.to(device), pixels.to(device), lengths)      # a sum
        (loss * dist.get_world_size() / supervised).backward()      # times the ranks: FSDP averages over them
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / supervised, n_tokens


def without_holes(samples: list[Sample | Bad], documents: Documents, holes: Counter) -> list[Sample]:
    """The good ones of this rank's samples. Bad ones of all ranks are counted by kind; the first of a kind is shown."""
    bad = [s for s in samples if isinstance(s, Bad)]
    for first in {s.kind: s for s in reversed(bad) if not holes[s.kind]}.values():
        why = " ".join(first.why.split())[:200]
        tqdm.write(f"bad sample, {first.kind}: {documents.where(first)}: {why}", file=sys.stderr)
    counts = torch.tensor([len(samples), *(sum(s.kind == kind for s in bad) for kind in BAD_KINDS)])
    dist.all_reduce(counts)
    holes.update(dict(zip(["seen", *BAD_KINDS], counts.tolist())))
    return [s for s in samples if not isinstance(s, Bad)]


def check_holes(holes: Counter, max_bad: float) -> None:
    """Raise InputError if more than a share of max_bad of the samples seen was bad."""
    bad = {kind: holes[kind] for kind in BAD_KINDS if holes[kind]}
    if sum(bad.values()) > max_bad * holes["seen"]:
        table = "".join(f"\n{n:10,}  {kind}" for kind, n in bad.items())
        raise InputError(f"{sum(bad.values()):,} of {holes['seen']:,} samples were bad, more than --max-bad {max_bad}:"
                         + table)


def check_order(position: Position) -> None:
    """Raise InputError, on all ranks, if they do not stand at the same place: they would repeat and lose samples."""
    marks = torch.tensor([1, -1]) * zlib.crc32(repr(position).encode())
    dist.all_reduce(marks, dist.ReduceOp.MAX)
    if marks.sum() != 0:
        raise InputError("the ranks read different data: is --data the same, and readable, on every node?")


def steps_of(loader) -> Iterator[tuple[list, Position]]:
    """What the loader brings, step by step: samples (or holes) of this rank, and the Position after them."""
    samples = []
    for item in loader:
        if isinstance(item, Position):
            yield samples, item
            samples = []
        else:
            samples.append(item)


def train_stage(stage: int, recipe: Recipe, model: AlignVLM, tokenizer: Tokenizer, documents: Documents | None, args,
                device: torch.device) -> None:
    """Train one stage of a sharded model on documents, or else on the toy's; a line of log.jsonl per step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in getattr(model, name).parameters() if (p.ndim > 1) == matrices],
          "weight_decay": recipe.weight_decay if matrices else 0.0, "scale": recipe.lr_scale.get(name, 1.0)}
         for name in recipe.trainable for matrices in (True, False)], betas=recipe.betas, eps=recipe.eps, fused=True)
    if documents:
        documents.settings = dict(tokenizer=tokenizer, config=model.config.vision, max_tiles=args.max_tiles,
                                  max_text=recipe.max_length, max_tokens=recipe.row_tokens)
        encode_chat([Turn("user", [])], tokenizer, [])      # refuses here, not sample by sample
        if args.steps is None:      # for the schedule and the bar; the stage ends where its last epoch does
            recipe.steps = math.ceil(recipe.epochs * documents.epoch_samples() / recipe.batch_size)
    else:
        documents = ToyDocuments(stage, recipe.steps * recipe.batch_size, args.seed, tokenizer, model.config.vision)
    order = deal(documents.draws(Position()), recipe.batch_size, rank, world)
    ahead = max(2, recipe.batch_size // (world * args.workers)) if args.workers else None       # about a step
    loader = DataLoader(documents, batch_size=None, sampler=order, num_workers=args.workers, prefetch_factor=ahead)
    log_file = args.out / f"stage{stage}.partial" / "log.jsonl" if rank == 0 else os.devnull
    holes, epoch, start = Counter(), 0, time.perf_counter()
    bar = tqdm(steps_of(loader), f"stage {stage}", recipe.steps, disable=rank > 0, mininterval=1)
    with open(log_file, "w") as log:
        for step, (samples, position) in enumerate(bar):
            check_order(position)
            rows = fill_rows(without_holes(samples, documents, holes), recipe.row_tokens)
            if holes["seen"] >= 1000 or position.epoch > epoch:
                check_holes(holes, args.max_bad)
            loss, n_tokens = accumulate_gradients(model, rows, device)
            lr, norm = learning_rate(step, recipe), None
            if loss is not None:
                norm = torch.nn.utils.clip_grad_norm_(params, recipe.clip).full_tensor().item()
                if not math.isfinite(norm):
                    raise InputError(f"stage {stage}, step {step}: the gradient's norm is {norm}; try a lower --lr")
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
            start, speed = time.perf_counter(), n_tokens / (time.perf_counter() - start)
            bad = {kind: holes[kind] for kind in BAD_KINDS if holes[kind]}
            log.write(json.dumps({"stage": stage, "step": step, "epoch": epoch, "loss": loss, "lr": lr,
                                  "grad_norm": norm, "tokens_per_s": speed, "bad": bad}) + "\n")
            shown = math.nan if loss is None else loss
            bar.set_postfix_str(f"loss {shown:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)
            epoch = position.epoch
            if step + 1 == args.steps or args.steps is None and epoch == recipe.epochs:
                break


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


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


def build(stage: int, recipe: Recipe, args, device: torch.device) -> AlignVLM:
    """The model as a stage starts, in fp32 and sharded: from released weights, from the last stage's folder, or for
    the toy's first stage from scratch. Sharding comes before reading, so that a rank reads no more than its part."""
    def prepare(model: AlignVLM) -> None:
        for name, module in model.named_children():
            module.requires_grad_(name in recipe.trainable)
        shard(model, device)

    torch.manual_seed(args.seed)
    if stage == 1 and args.llm:
        return AlignVLM.from_backbones(args.vision, args.llm, torch.float32, device, prepare)
    if stage > 0:
        model = AlignVLM.from_pretrained(args.out / f"stage{stage - 1}", torch.float32, device, prepare)
        if stage == 1:
            model.connector.init_weights(model.llm.head)        # W2 starts from the head that stage 0 has trained
        return model
    model = AlignVLM(ALIGNVLM_PRESETS["toy"])
    model.vision.init_weights()
    model.llm.init_weights()
    model.connector.init_weights(model.llm.head)
    prepare(model.to(device))
    return model


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


def start_processes() -> torch.device:
    """Join torchrun's processes, or be the only one; nccl on CUDA, gloo on a CPU."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"        # counts travel over gloo
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(RECIPES), help="recipe (default: by the size of --llm; without one the toy's)")
    add("--vision", type=Path, help="folder with a released SigLIP, for stage 1 (default: the toy's own)")
    add("--llm", type=Path, help="folder with a released Llama and its tokenizer, for stage 1 (default: the toy's own)")
    add("--stage", type=int, choices=[0, 1, 2, 3], help="train this stage only (default: all, in order)")
    add("--out", type=Path, help="the run's folder (default: out/PRESET)")
    add("--retrain", action="store_true", help="train also what is already complete in --out")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=int, help="optimizer steps of each stage (default: the recipe's)")
    add("--batch-size", type=int, help="samples a step, over all processes (default: the recipe's)")
    add("--row-tokens", type=int, help="tokens a forward pass, visual ones too; a process's share of a step takes as "
        "many as it needs (default: the recipe's)")
    add("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add("--data", nargs="+", metavar="PATH[:WEIGHT]", help="what --stage learns from: folders, files or globs of tar "
        "(img2dataset), parquet (BigDocs, VCR-wiki), JSONL or JSON (DocDownstream, MS-Swift, LLaVA); with weights the "
        "data sets are mixed in that ratio (default: the toy's drawn pages)")
    add("--max-tiles", type=int, default=9, help="tiles a page is cut into at most (default: %(default)s)")
    add("--max-bad", type=float, default=0.01, help="share of bad samples above which training stops, judged from a "
        "thousand samples or an epoch on (default: %(default)s)")
    add("--workers", type=int, help="data loading processes per process (default: with --data up to 4, else 0)")
    add("--held-out", type=int, default=200, help="held-out documents read at the end (default: %(default)s; 0: none)")
    args = parser.parse_args()
    numbers = args.steps, args.batch_size, args.row_tokens, args.lr, args.max_tiles
    if any(x is not None and not x > 0 for x in numbers):
        parser.error("--steps, --batch-size, --row-tokens, --lr and --max-tiles are more than 0")
    args.workers = args.workers if args.workers is not None else min(4, os.cpu_count()) if args.data else 0
    if min(args.workers, args.held_out, args.seed) < 0 or not 0 <= args.max_bad <= 1:
        parser.error("--workers, --held-out and --seed are at least 0, --max-bad is a share from 0 to 1")
    if args.data and not args.stage:
        parser.error("--data is for one stage: add --stage 1, 2 or 3")
    if bool(args.vision) != bool(args.llm):
        parser.error("--vision and --llm go together: two folders with released weights")
    return args


def choose_preset(args) -> str:
    """The recipe that was asked for, or the one that goes with the LLM's size: that of --llm, or of the folder from
    which --stage starts. The toy's without either."""
    started = args.out / f"stage{args.stage - 1}" / "config.json" if args.out and args.stage else None
    if args.llm and args.preset is None:
        size = asdict(read_llama(args.llm)[0])
    elif args.preset is None and started and started.exists():
        size = Settings(started).section("llm").values
    else:
        return args.preset or "toy"
    sizes = {(config.hidden_size, config.n_layers): name for name, config in LLAMA_PRESETS.items()}
    return sizes.get((size.get("hidden_size"), size.get("n_layers")), "llama-3.2-1b")


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, and not older than the stage that it started from."""
    folder, previous = (out / f"stage{s}" / "config.json" for s in (stage, stage - 1))
    return folder.exists() and (not previous.exists() or folder.stat().st_mtime >= previous.stat().st_mtime)


def check_recipe(folder: Path, recipe: dict) -> None:
    """Raise InputError if a complete stage was trained with another recipe than is asked for now."""
    before = json.loads((folder / "recipe.json").read_text())
    changed = [f"{key} {before.get(key)}, not {value}" for key, value in recipe.items() if before.get(key) != value]
    if changed:
        raise InputError(f"{folder} was trained with {', '.join(changed)}: take another --out, or --retrain")


def main() -> None:
    args = parse_args()
    args.preset = choose_preset(args)
    args.out = args.out or Path("out") / args.preset
    if args.preset != "toy" and args.steps is None and not args.data:
        raise InputError(f"the recipe {args.preset} counts epochs, which drawn pages do not have: "
                         "give --data or --steps")
    documents = Documents(args.data, args.seed) if args.data else None
    keep_heap()
    keep_files_open()
    device = start_processes()
    main_rank = dist.get_rank() == 0
    toy = args.preset == "toy"
    stages = [1, 2, 3] if args.stage is None else [args.stage]
    if not args.llm and 1 in stages and not is_complete(0, args.out) and (args.retrain or not is_complete(1, args.out)):
        if not toy:
            raise InputError(f"the recipe {args.preset} is for released weights: give stage 1 --vision and --llm")
        stages = [0, *stages]       # the toy's LLM is pretrained, as a released one is
    given = {name: getattr(args, name) for name in ("steps", "batch_size", "row_tokens", "lr")}
    for stage in stages:
        if stage not in RECIPES[args.preset]:
            raise InputError(f"--preset {args.preset} has no stage {stage}")
        recipe = replace(RECIPES[args.preset][stage], **{k: v for k, v in given.items() if v is not None})
        record = {"preset": args.preset, "seed": args.seed, "data": args.data if stage > 0 else None,
                  "max_tiles": args.max_tiles, **asdict(recipe)}
        record = json.loads(json.dumps(record))
        folder = args.out / f"stage{stage}"
        if is_complete(stage, args.out) and not args.retrain:
            check_recipe(folder, record)
            if main_rank:
                print(f"stage {stage} is complete in {folder} (--retrain trains it again)")
            continue
        if stage > 1 and not (args.out / f"stage{stage - 1}" / "config.json").exists():
            raise InputError(f"stage {stage} starts from stage {stage - 1}, and {args.out} has none: train that first")
        partial = folder.with_name(folder.name + ".partial")
        # A tokenizer goes with its LLM: the released one's, or the one in the folder from which the stage starts.
        source = args.llm if stage == 1 and args.llm else partial if stage == 0 else args.out / f"stage{stage - 1}"
        model = build(stage, recipe, args, device)
        if stage > 0:
            tokenizer = Tokenizer(source, model.config.llm.vocab_size)
        if main_rank:       # nothing is written before everything is read
            try:
                partial.mkdir(parents=True, exist_ok=True)
                (partial / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
                if stage == 0:
                    write_toy_tokenizer(partial / "tokenizer.model")
            except OSError as error:
                raise InputError(f"--out {args.out}: {error.strerror}") from None
        dist.barrier()
        if stage == 0:
            tokenizer = Tokenizer(source, model.config.llm.vocab_size)
        train_stage(stage, recipe, model, tokenizer, documents if stage > 0 else None, args, device)
        model.save_pretrained(folder, tokenizer.path, torch.float32 if toy else torch.bfloat16)
    if toy and main_rank and 3 in stages and args.held_out:
        folder = args.out / "stage3"
        model = AlignVLM.from_pretrained(folder, device=device).eval()
        scores = held_out_scores(model, Tokenizer(folder, model.config.llm.vocab_size), args.held_out, args.seed)
        (folder / "held_out.json").write_text(json.dumps(scores, indent=2) + "\n")
        for group, s in scores.items():
            print(f"{group}: exact_match={s['exact_match']:.3f} cer={s['cer']:.3f} n={s['n']}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: interrupted; the stages that were complete are kept", file=sys.stderr)
        sys.exit(130)
