"""Stage 0 of the reader's LLM: to read pages that are laid out as patches, but not drawn.

    python -m reader.llm --out out/reader/llm           # the same command goes on where it ended
"""
import argparse
import itertools
import random
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from data import Tokenizer
from model import IGNORE, IMAGE, Llama, LlamaConfig
from plumbing.files import partial_of
from plumbing.processes import run_main
from plumbing.settings import InputError, positive
from plumbing.texts import edit_distance
from reader import training
from reader.encoder import CONFIG, LARGE
from reader.lessons import LaidOut, write_tokenizer
from reader.quick import quicken


def llm_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, n_layers=5, n_heads=4,
                       n_kv_heads=4, head_dim=64, intermediate_size=768, rope_theta=10_000.0,
                       rope_factor=1.0, tie_embeddings=False)


def embed(llm: Llama, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """tokens (1, L), and the mixtures (P, n) of its IMAGE places -> (1, L, D)."""
    E_text = llm.embed_tokens.weight                                            # (V, D)
    x = nnf.embedding(tokens.clamp(min=0), E_text)                  # (1, L, D), equation 3
    mixed = nnf.embedding_bag(ids, E_text, per_sample_weights=weights, mode="sum")      # (P, D)
    places = (tokens == IMAGE).flatten().nonzero()[:, 0]                        # (P,), of L
    return x.flatten(0, 1).index_copy(0, places, mixed).view_as(x)


def answer_logits(llm: Llama, batch: tuple) -> tuple[Tensor, Tensor]:
    """The logits (n, V) of a step's supervised tokens, and which they should be (n,)."""
    tokens, labels, ids, weights, lengths = batch
    with training.in_bf16():
        h = llm.hidden(embed(llm, tokens, ids, weights), lengths)               # (1, L, D)
        logits = h[labels != IGNORE] @ llm.head.T                               # (n, V)
    return logits.float(), labels[labels != IGNORE]


@torch.no_grad()
def scores_on(llm: Llama, tokenizer: Tokenizer, batches: dict[str, list]) -> dict[str, float]:
    """For each kind of batch two scores; an example of it is printed.

    NAME: the share of the answers' tokens that are right when all before them are given.
    NAME_errors: of the first pages, read greedily, the share of the characters that are wrong.
    """
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
        for answer, token in zip(read, step):
            if token is not None:
                answer.append(token)
    return [tokenizer.decode(answer) for answer in read], golds


def write_own_tokenizer(path: Path) -> None:
    """Write the reader's tokenizer. Raises InputError where another one is there."""
    new = partial_of(path)
    write_tokenizer(new)
    if path.exists() and path.read_bytes() != new.read_bytes():
        new.unlink()
        raise InputError(f"{path}: not the reader's tokenizer: take another --out")
    new.replace(path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    write_own_tokenizer(args.out / "tokenizer.model")
    tokenizer = Tokenizer(args.out)
    llm = Llama(llm_config(tokenizer))
    llm.init_weights()
    quicken(llm)
    held_out = held_out_steps(LaidOut(args.seed, "held-out", tokenizer, CONFIG, LARGE))
    training.train(nn.ModuleDict({"llm": llm}),
                   LaidOut(args.seed, "train", tokenizer, CONFIG, LARGE, args.tokens),
                   lambda *batch: nnf.cross_entropy(*answer_logits(llm, batch)),
                   lambda: scores_on(llm, tokenizer, held_out), (0.9, 0.95), 0.1, args)


def held_out_steps(data: LaidOut, n: int = 2) -> dict[str, list]:
    """n steps of each: tiles of both sizes, single ones and several, as the lesson's last."""
    kinds = {"single": (CONFIG, True), "tiled": (CONFIG, False),
             "large": (LARGE, True), "large_tiled": (LARGE, False)}
    return {name: [training.on_device(data.row(random.Random(f"{name}/{i}"), 10_000, *kind))
                   for i in range(n)] for name, kind in kinds.items()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reader.llm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=positive(int), default=7000,
                        help="of a step, about (default: %(default)s)")
    training.add_flags(parser, "out/reader/llm", 6000)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(lambda: train(parse_args()))
