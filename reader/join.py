"""Stage 0's two halves -> a model: the reader's encoder, its LLM, and a new Align between them.

    python -m reader.join out/reader        # trains both as far as they should be, then joins them

W2 is a copy of the LLM's head and W1 is random, as the paper has it, and the encoder's readout is
left behind. Then encoder and Align have a lesson without the LLM: P_vocab of a patch shall be the
mixture of its characters that the LLM has learnt to read. The paper leaves that to stage 1, which
has millions of captions; ours has tens of thousands of pages. train.py's stage 1 starts from
OUT/stage0.
"""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Tokenizer
from model import AlignVLM, AlignVLMConfig
from plumbing.processes import run_main
from plumbing.settings import a_path
from reader import encoder, llm, training
from reader.drawing import BLANK, N_CLASSES, SLOTS
from reader.lessons import WEIGHTS, class_tokens
from reader.quick import quicken

BLANK_WEIGHT = 0.15         # of a patch without print in Align's lesson: most of them are
STEPS = 1500                # of that lesson


def join(out: Path, seed: int = 0) -> tuple[AlignVLM, Tokenizer]:
    """The newest states of both lessons as one model. seed: of W1."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(out / "llm")
    model = AlignVLM(AlignVLMConfig(encoder.CONFIG, llm.llm_config(tokenizer)))
    readout = nn.Linear(encoder.CONFIG.hidden_size, SLOTS * N_CLASSES)
    training.load_state(out / "encoder" / "state.safetensors",
                        nn.ModuleDict({"vision": model.vision, "readout": readout}), None)
    training.load_state(out / "llm" / "state.safetensors", nn.ModuleDict({"llm": model.llm}), None)
    model.connector.init_weights(model.llm.head)
    return model, tokenizer


def teach_align(model: AlignVLM, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Train encoder and connector on tiles of print, until args.steps. Changes both.

    From its start: what an earlier lesson has left in args.out began with another encoder.
    """
    for name in ("state.safetensors", "log.jsonl"):
        (args.out / name).unlink(missing_ok=True)
    token_of = torch.from_numpy(class_tokens(tokenizer)).to(training.DEVICE)    # (N_CLASSES,)
    quicken(model.vision)

    def loss(pixels: Tensor, classes: Tensor) -> Tensor:
        """pixels (B, S, S, 3), classes (B, N, SLOTS) -> the cross-entropy of P_vocab, in nats."""
        with training.in_bf16():
            F = model.vision(encoder.normalise(pixels, encoder.CONFIG)).float()         # (B, N, d)
        P_vocab = model.connector.p_vocab(F)                                # (B, N, V), equation 1
        tokens, weights = target(classes, token_of)                             # (B, N, SLOTS) both
        nats = -(P_vocab.gather(-1, tokens).clamp(min=1e-9).log() * weights).sum(-1)    # (B, N)
        counts = torch.where(classes[..., 0] == BLANK, BLANK_WEIGHT, 1.0)               # (B, N)
        return (nats * counts).sum() / counts.sum()

    scraps = encoder.Scraps(args.seed + 1, "train", encoder.CONFIG, 16)
    held_out = training.on_device(encoder.Scraps(args.seed, "held-out", encoder.CONFIG, 32)[0])
    modules = nn.ModuleDict({"vision": model.vision, "connector": model.connector})
    training.train(modules, scraps, loss, lambda: scores_on(model, held_out, token_of, loss),
                   (0.9, 0.95), 0.1, args)


@torch.no_grad()
def scores_on(model: AlignVLM, held_out: tuple[Tensor, Tensor], token_of: Tensor,
              loss: Callable[..., Tensor]) -> dict[str, float]:
    """The loss on held-out tiles, and the share of patches with print whose likeliest token, but
    for the blank one, is their first character's."""
    pixels, classes = held_out
    P_vocab = model.connector.p_vocab(model.vision(encoder.normalise(pixels, encoder.CONFIG)))
    P_vocab[..., token_of[BLANK]] = 0
    likeliest, printed = P_vocab.argmax(-1), classes[..., 0] != BLANK               # (B, N) both
    first = (likeliest == token_of[classes[..., 0]])[printed].float().mean().item()
    return {"held_out": loss(pixels, classes).item(), "first": first}


def target(classes: Tensor, token_of: Tensor) -> tuple[Tensor, Tensor]:
    """classes (B, N, SLOTS) -> the tokens of a patch's mixture and their weights, both
    (B, N, SLOTS), as the LLM's lesson has them: what a slot lacks goes to the blank token."""
    weights = torch.tensor(WEIGHTS, device=classes.device).expand(classes.shape)
    return token_of[classes], weights


def make_stage0(out: Path, seed: int = 0) -> Path:
    """Train both backbones in OUT/encoder and OUT/llm, from where they are; join them, write
    OUT/stage0 and return it."""
    encoder.train(encoder.parse_args(["--out", f"{out}/encoder", "--seed", str(seed)]))
    llm.train(llm.parse_args(["--out", f"{out}/llm", "--seed", str(seed)]))
    model, tokenizer = join(out, seed)
    flags = argparse.ArgumentParser()
    training.add_flags(flags, "", STEPS)
    teach_align(model, tokenizer,
                flags.parse_args(["--out", f"{out}/connector", "--lr", "1e-3", "--seed",
                                  str(seed)]))
    model.to("cpu").save_pretrained(out / "stage0", tokenizer.path, torch.float32)
    return out / "stage0"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reader.join", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("out", type=a_path, nargs="?", default=Path("out/reader"), help="(default: %(default)s)")
    args = parser.parse_args()
    print(make_stage0(args.out, args.seed))


if __name__ == "__main__":
    run_main(main)
