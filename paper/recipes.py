"""What each stage trains, and how: the paper's recipes (appendix A.1), the second version's small
one, the toy's and the reader's.

train.py follows them, paper/plan.py says what they take. Both change them with --lr-scale, whose
type is here too.
"""
import argparse
import re
from dataclasses import dataclass, field, replace

from model import LLAMA_PRESETS, LlamaConfig
from plumbing.settings import InputError


@dataclass
class Recipe:
    """One stage. The first block is the paper's (appendix A.1; row_tokens is ours), the second
    MS-Swift's defaults, the third ours."""
    trainable: tuple[str, ...]          # modules of AlignVLM; the others are frozen
    batch_size: int = 512               # samples a step, over all ranks
    lr: float = 1e-5
    max_length: int = 1024              # text tokens a sample
    epochs: int = 1
    row_tokens: int = 16_384            # tokens a packed row, visual ones too; a step has several

    warmup: float = 0.05                # share of the steps
    final_lr: float = 0.0               # where the cosine ends, as a share of lr
    weight_decay: float = 0.1           # on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0                   # of the gradient's norm

    eps: float = 1e-8
    lr_scale: dict[str, float] = field(default_factory=dict)    # by module, times lr
    steps: int | None = None            # drawn documents have steps, not epochs
    bf16: bool = False                  # calculate in bf16 also on a CPU


ALL = ("vision", "connector", "llm")
LATE = ("connector", "llm")             # stage 3 freezes the vision encoder

# Adam moves what has a tiny gradient as far as anything else: the head's rows of tokens that are
# never an answer, for one, and W2 starts from that head. An eps of 1e-5 holds them back.
TOY = Recipe(ALL, batch_size=16, row_tokens=8192, warmup=0.03, final_lr=0.1, eps=1e-5)

READER = replace(TOY, row_tokens=12_288, bf16=True, eps=1e-6)
SLOWER = {"vision": 0.5, "connector": 0.5}      # than the LLM: these two know their lesson better

RECIPES = {
    "toy": {
        0: replace(TOY, trainable=("llm",), lr=1.5e-3, steps=3000),
        1: replace(TOY, lr=1e-3, steps=200, lr_scale={"llm": 0.05}, warmup=0.1),
        2: replace(TOY, lr=1e-3, steps=300),
        3: replace(TOY, trainable=LATE, lr=5e-4, steps=900, final_lr=0.0),
    },
    # Stage 0 is reader.join's. Then single tiles read aloud, pages with questions, more of these.
    "reader": {
        1: replace(READER, lr=8e-4, steps=2500, lr_scale=SLOWER),
        2: replace(READER, lr=8e-4, steps=1040, batch_size=6, lr_scale=SLOWER),
        3: replace(READER, trainable=LATE, lr=6e-4, steps=1150, batch_size=8, final_lr=0.0),
    },
    "llama-3.2-1b": {
        1: Recipe(ALL),
        2: Recipe(ALL, lr=5e-5, max_length=2048),
        3: Recipe(LATE, lr=5e-5, max_length=2048, epochs=5),
    },
    "llama-3.2-3b": {
        1: Recipe(ALL),
        2: Recipe(ALL, batch_size=256, lr=5e-5, max_length=2048),
        3: Recipe(LATE, batch_size=256, lr=5e-5, max_length=2048, epochs=5),
    },
    "llama-3.1-8b": {
        1: Recipe(ALL),
        2: Recipe(ALL, batch_size=256, lr=1e-5, max_length=2048),
        3: Recipe(LATE, batch_size=256, lr=1e-5, max_length=2048, epochs=5),
    },
    # The second version's small setup: LLaVA-558K for the connector alone, then LLaVA-NeXT-779K.
    # It gives the learning rates; batch sizes and lengths are LLaVA's.
    "low-resource": {
        1: Recipe(("connector",), batch_size=256, lr=1e-3, max_length=2048),
        2: Recipe(ALL, batch_size=128, lr=1e-5, max_length=4096, lr_scale={"vision": 0.2}),
    },
}


def preset_for(llm: LlamaConfig) -> str:
    """The released LLM's preset, or the toy's, whose LLM has this size; llama-3.2-1b for others."""
    for name, preset in LLAMA_PRESETS.items():
        if (preset.hidden_size, preset.n_layers) == (llm.hidden_size, llm.n_layers):
            return name
    return "llama-3.2-1b"


def recipe_for(preset: str, stage: int, changes: dict, lr_scale: dict[str, float]) -> Recipe:
    """A preset's recipe for a stage, with what a command line says instead.

    changes: values by the fields' names, None for those that stay. lr_scale: shares by module; one
    of 0 freezes it, any other trains it. Raises InputError where the preset lacks the stage or
    nothing trains.
    """
    if stage not in RECIPES[preset]:
        raise InputError(f"--preset {preset} has no stage {stage}")
    recipe = RECIPES[preset][stage]
    recipe = replace(recipe, **{name: new for name, new in changes.items() if new is not None})
    trainable = tuple(name for name in ALL if lr_scale.get(name, name in recipe.trainable))
    if not trainable:
        raise InputError(f"--lr-scale leaves nothing to train in stage {stage}")
    return replace(recipe, trainable=trainable, lr_scale={**recipe.lr_scale, **lr_scale})


def lr_share(text: str) -> tuple[str, float]:
    """The argparse type of one of --lr-scale's: "vision=0.2" -> ("vision", 0.2)."""
    match = re.fullmatch(r"(vision|connector|llm)=(\d*\.?\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not vision, connector or llm, =, and a share")
    return match[1], float(match[2])
