"""Stage 0's two halves -> a model: the reader's encoder, its LLM, and a new Align between them.

    python -m reader.join --encoder out/reader/encoder --llm out/reader/llm out/reader/stage0

train.py's stage 1 starts from the folder, as it does from released backbones: W2 is a copy of the
LLM's head, W1 is random. The encoder's readout is left behind.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from data import Tokenizer
from model import AlignVLM, AlignVLMConfig
from plumbing.processes import run_main
from reader.drawing import N_CLASSES, SLOTS
from reader.encoder import CONFIG
from reader.llm import llm_config
from reader.states import load_state


def join(encoder: Path, llm: Path, seed: int = 0) -> tuple[AlignVLM, Tokenizer]:
    """The newest states of both lessons as one model."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(llm)
    model = AlignVLM(AlignVLMConfig(CONFIG, llm_config(tokenizer)))
    readout = nn.Linear(CONFIG.hidden_size, SLOTS * N_CLASSES)
    load_state(encoder / "state.safetensors",
               nn.ModuleDict({"vision": model.vision, "readout": readout}), None)
    load_state(llm / "state.safetensors", nn.ModuleDict({"llm": model.llm}), None)
    model.connector.init_weights(model.llm.head)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--encoder", type=Path, default=Path("out/reader/encoder"), help="of reader.encoder")
    add("--llm", type=Path, default=Path("out/reader/llm"), help="of reader.llm")
    add("--seed", type=int, default=0, help="of W1 (default: %(default)s)")
    add("folder", type=Path, nargs="?", default=Path("out/reader/stage0"), help="to be written")
    args = parser.parse_args()
    model, tokenizer = join(args.encoder, args.llm, args.seed)
    model.save_pretrained(args.folder, tokenizer.path, torch.float32)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters in {args.folder}")


if __name__ == "__main__":
    run_main(main)
