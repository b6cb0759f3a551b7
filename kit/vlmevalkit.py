"""VLMEvalKit runs a trained AlignVLM on its benchmarks.

    pip install ms-vlmeval==0.0.20
    python -m kit.vlmevalkit --checkpoint out/1b/stage3 --data DocVQA_VAL ChartQA_TEST

This is VLMEvalKit's own runner with one model more, called AlignVLM. It asks its own prompts, one
question at a time, and scores the answers. All other flags are its own:
`python -m vlmeval.run --help`.
"""
import argparse
import sys
from pathlib import Path

import torch

try:
    import vlmeval.run
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    print(f"vlmevalkit.py: {error}: VLMEvalKit needs `pip install ms-vlmeval==0.0.20`",
          file=sys.stderr)
    sys.exit(2)

from data import Tokenizer
from model import AlignVLM
from plumbing import fast
from plumbing.images import read_pages
from plumbing.processes import run_main
from plumbing.settings import InputError
from sample import SHIPPED, answer

NAME = "AlignVLM"       # in VLMEvalKit's list of models


class KitModel(BaseModel):
    """A model folder as VLMEvalKit asks it: greedily, with the defaults of eval.py.

    Raises InputError for a folder that cannot be used.
    """

    INTERLEAVE = False              # the images of a question stand before its texts

    def __init__(self, folder: str | Path, max_new_tokens: int = 256,
                 max_tiles: int | None = None):
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AlignVLM.from_pretrained(folder, device=device).eval()
        fast.use(self.model, inference=True)
        self.tokenizer = Tokenizer(folder, self.model.config.llm.vocab_size)
        self.options = {"max_new_tokens": max_new_tokens, "max_tiles": max_tiles}

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to a message: parts with a type, "image" or "text", and a value, which is the
        name of the image's file or the text.

        Raises InputError for parts of other types, and for images that cannot be used.
        """
        pages, texts = [], []
        for part in message:
            if part["type"] == "image":
                pages += read_pages(part["value"])
            elif part["type"] == "text":
                texts.append(part["value"])
            else:
                raise InputError(f"{dataset}: a question with a {part['type']}: AlignVLM reads "
                                 "images and texts")
        *_, [text] = answer(self.model, self.tokenizer, [pages], ["\n".join(texts)],
                            **self.options)
        return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kit.vlmevalkit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=SHIPPED, help="model folder, or a name on the hub, "
                        "`owner/name` (default: the shipped model, reader/stage3)")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME", help="VLMEvalKit's "
                        "names of benchmarks; NAME.tsv lies in the folder that the environment "
                        "variable LMUData names, or is downloaded")
    args, others = parser.parse_known_args()
    model = KitModel(args.checkpoint)
    supported_VLM[NAME] = lambda: model
    sys.argv[1:] = ["--model", NAME, "--data", *args.data, *others]
    vlmeval.run.main()


if __name__ == "__main__":
    run_main(main)
