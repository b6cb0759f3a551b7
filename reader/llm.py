"""Stage 0 of the reader's LLM: to read pages that are laid out as patches, but not drawn.

    python -m reader.llm --out out/reader/llm           # the same command goes on where it ended
"""
import argparse
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import Tokenizer
from model import IGNORE, IMAGE, Llama, LlamaConfig
from plumbing.processes import run_main
from plumbing.runs import claim
from plumbing.texts import edit_distance
from reader.encoder import CONFIG as VISION
from reader.lessons import LaidOut, write_tokenizer
from reader.quick import quicken
from reader.states import Log, learning_rate, load_state, save_state


def llm_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, n_layers=4, n_heads=4,
                       n_kv_heads=4, head_dim=64, intermediate_size=768, rope_theta=10_000.0,
                       rope_factor=1.0, tie_embeddings=False)


def embed(llm: Llama, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """tokens (1, L), and the mixtures (P, SLOTS + 1) of its IMAGE places -> (1, L, D)."""
    E_text = llm.embed_tokens.weight                                            # (V, D)
    x = nnf.embedding(tokens.clamp(min=0), E_text)                              # (1, L, D)
    mixed = nnf.embedding_bag(ids, E_text, per_sample_weights=weights, mode="sum")      # (P, D)
    places = (tokens == IMAGE).flatten().nonzero()[:, 0]                        # (P,), of L
    return x.flatten(0, 1).index_copy(0, places, mixed).view_as(x)


def answer_logits(llm: Llama, batch: tuple) -> tuple[Tensor, Tensor]:
    """The logits (n, V) of a step's supervised tokens, and which they should be (n,)."""
    tokens, labels, ids, weights, lengths = batch
    with torch.autocast("cpu", torch.bfloat16):
        h = llm.hidden(embed(llm, tokens, ids, weights), lengths)               # (1, L, D)
        logits = h[labels != IGNORE] @ llm.head.T                               # (n, V)
    return logits.float(), labels[labels != IGNORE]


@torch.no_grad()
def scores_on(llm: Llama, tokenizer: Tokenizer, batches: dict[str, list]) -> dict[str, float]:
    """For each kind of batch: the share of answers' tokens right after the right ones, and of the
    first pages' characters the share that is wrong, read greedily."""
    scores = {}
    for name, some in batches.items():
        right = []
        for batch in some:
            logits, gold = answer_logits(llm, batch)
            right.append(logits.argmax(-1) == gold)
        scores[name] = torch.cat(right).float().mean().item()
        read, golds = read_aloud(llm, tokenizer, some[0])
        wrong = sum(edit_distance(a, b) for a, b in zip(read, golds))
        scores[f"{name}_errors"] = wrong / sum(map(len, golds))
        print(repr(golds[0][:90]), "read as", repr(read[0][:90]), flush=True)
    return scores


def read_aloud(llm: Llama, tokenizer: Tokenizer, batch: tuple,
               most: int = 12) -> tuple[list[str], list[str]]:
    """The first answers of a batch's first samples, greedily, and what they should be."""
    tokens, labels, ids, weights, lengths = batch
    prompts, golds = [], []
    samples = zip(embed(llm, tokens, ids, weights)[0].split(lengths), labels[0].split(lengths))
    for x, of in itertools.islice(samples, most):
        start = (of != IGNORE).int().argmax() + 1       # the first answer's place
        gold = of[start - 1:].tolist()
        gold = gold[:next(i for i, token in enumerate(gold) if token in tokenizer.stop)]
        prompts.append(x[:start])
        golds.append(tokenizer.decode(gold))
    read = [[] for _ in golds]
    x = nn.utils.rnn.pad_sequence(prompts, True)
    for step in llm.generate(x, [len(p) for p in prompts], tokenizer.stop,
                             max(map(len, golds)) + 20):
        for text, token in zip(read, step):
            text += [token] if token is not None else []
    return [tokenizer.decode(text) for text in read], golds


def train(args) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    claim(args.out)
    write_tokenizer(args.out / "tokenizer.model")
    tokenizer = Tokenizer(args.out)
    llm = Llama(llm_config(tokenizer))
    llm.init_weights()
    quicken(llm)
    modules, params = nn.ModuleDict({"llm": llm}), list(llm.parameters())
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    state, step, minutes = args.out / "state.safetensors", 0, 0.0
    if state.exists():
        record = load_state(state, modules, optimizer)
        step, minutes = record["step"], record["minutes"]
    log = Log(args.out / "log.jsonl", minutes)
    held_out = held_out_steps(LaidOut(args.seed, "held-out", tokenizer, VISION))
    data = LaidOut(args.seed, "train", tokenizer, VISION, args.tokens)
    total, since = 0.0, time.monotonic()
    for batch in DataLoader(data, None, sampler=range(step, args.steps), num_workers=args.workers,
                            prefetch_factor=8 if args.workers else None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = nnf.cross_entropy(*answer_logits(llm, batch))
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, total = step + 1, total + loss.item()
        if step % args.log_every == 0:
            seconds, since = (time.monotonic() - since) / args.log_every, time.monotonic()
            scores = scores_on(llm, tokenizer, held_out) if step % args.eval_every == 0 else {}
            log.write(step=step, loss=total / args.log_every, seconds=seconds, **scores)
            total = 0.0
        if step % args.save_every == 0 or step == args.steps:
            save_state(state, modules, optimizer, {"step": step, "minutes": log.minutes,
                                                   "seed": args.seed, "steps": args.steps})


def held_out_steps(data: LaidOut, n: int = 2) -> dict[str, list]:
    """The first n steps of single tiles, and of several, as the lesson's last ones are."""
    steps = [data[10_000 + i] for i in range(8 * n)]
    few = [step for step in steps if len(step[-1]) < 8]
    many = [step for step in steps if len(step[-1]) >= 8]
    return {"single": many[:n], "tiled": few[:n]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/reader/llm"), help="where state and log go")
    add("--steps", type=int, default=6000, help="(default: %(default)s)")
    add("--tokens", type=int, default=7000, help="of a step, about (default: %(default)s)")
    add("--lr", type=float, default=1.5e-3, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="that train (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    add("--log-every", type=int, default=50, help="steps (default: %(default)s)")
    add("--eval-every", type=int, default=250, help="steps (default: %(default)s)")
    add("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(lambda: train(parse_args()))
