"""Stage 0's two halves -> a model: the reader's encoder, its LLM, and a new Align between them.

    python -m reader.join out/reader        # trains both as far as they should be, then joins them
    python -m reader.join out/reader --now  # joins the newest states as they are

train.py's stage 1 starts from out/reader/stage0, as it does from released backbones: W2 is a copy
of the LLM's head, W1 is random. The encoder's readout is left behind.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from data import Tokenizer
from model import AlignVLM, AlignVLMConfig
from plumbing.processes import run_main
from reader import encoder, llm
from reader.drawing import N_CLASSES, SLOTS
from reader.training import load_state


def join(out: Path, seed: int = 0) -> tuple[AlignVLM, Tokenizer]:
    """The newest states of both lessons as one model. seed: of W1."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(out / "llm")
    model = AlignVLM(AlignVLMConfig(encoder.CONFIG, llm.llm_config(tokenizer)))
    readout = nn.Linear(encoder.CONFIG.hidden_size, SLOTS * N_CLASSES)
    load_state(out / "encoder" / "state.safetensors",
               nn.ModuleDict({"vision": model.vision, "readout": readout}), None)
    load_state(out / "llm" / "state.safetensors", nn.ModuleDict({"llm": model.llm}), None)
    model.connector.init_weights(model.llm.head)
    return model, tokenizer


def make_stage0(out: Path, seed: int = 0, now: bool = False) -> Path:
    """Train both backbones in OUT/encoder and OUT/llm, from where they are, unless `now`; write
    OUT/stage0 and return it."""
    if not now:
        encoder.train(encoder.parse_args(["--out", f"{out}/encoder", "--seed", str(seed)]))
        llm.train(llm.parse_args(["--out", f"{out}/llm", "--seed", str(seed)]))
    model, tokenizer = join(out, seed)
    model.save_pretrained(out / "stage0", tokenizer.path, torch.float32)
    return out / "stage0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--now", action="store_true", help="join what there is, without training")
    add("out", type=Path, nargs="?", default=Path("out/reader"), help="(default: %(default)s)")
    args = parser.parse_args()
    print(make_stage0(args.out, args.seed, args.now))


if __name__ == "__main__":
    run_main(main)
