"""Ask a trained AlignVLM about a document.

    python sample.py --image doc.png                                    # reads the page aloud
    python sample.py --image doc.png --prompt "what is TAX?"
    python sample.py --questions pages/questions.jsonl --answers answers.jsonl

Without --checkpoint the newest trained model under out/ is taken.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import READ, Tokenizer, answer
from model import AlignVLM
from vision import InputError, read_image


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The highest stage of the run that was trained last, of the runs out/*/stageN."""
    stages = [path.parent for path in out.glob("*/stage[123]/model.safetensors")]
    if not stages:
        raise InputError(f"no trained model under {out}/: run `python train.py` first, or name one with --checkpoint")
    run = max(stages, key=lambda folder: (folder / "model.safetensors").stat().st_mtime).parent
    return max(folder for folder in stages if folder.parent == run)


def answer_file(model: AlignVLM, tokenizer: Tokenizer, args) -> None:
    """JSONL in (image, prompt, ...), the same rows with `prediction` out; written beside, then renamed."""
    questions = Path(args.questions)
    rows = []
    try:
        lines = questions.read_text(encoding="utf-8-sig").split("\n")      # splitlines() would also cut inside a string
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(json.loads(line))
                if not all(isinstance(rows[-1][key], str) for key in ("image", "prompt")):
                    raise TypeError("both are strings")
                if not (questions.parent / rows[-1]["image"]).is_file():
                    raise InputError(f"{questions}, line {number}: no file {questions.parent / rows[-1]['image']}")
    except FileNotFoundError:
        raise InputError(f"{questions}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{questions}: not UTF-8 text") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f'{questions}, line {number}: not JSON with an "image" and a "prompt", both strings') from None
    if Path(args.answers).is_dir():
        raise InputError(f"--answers {args.answers}: a folder, not a file")
    partial = Path(args.answers + ".partial")
    with partial.open("w", encoding="utf-8") as out, tqdm(total=len(rows), desc="questions") as bar:
        for first in range(0, len(rows), 16):
            batch = rows[first:first + 16]
            images = [read_image(questions.parent / row["image"]) for row in batch]
            *_, predictions = answer(model, tokenizer, images, [row["prompt"] for row in batch], **generation(args))
            for row, prediction in zip(batch, predictions):
                out.write(json.dumps({**row, "prediction": prediction}) + "\n")
            bar.update(len(batch))
    os.replace(partial, args.answers)


def generation(args) -> dict:
    names = ["max_tiles", "max_new_tokens", "temperature", "top_p", "seed"]
    return {name: getattr(args, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="the document: PNG, JPEG, TIFF, ... in any mode and of any size")
    parser.add_argument("--prompt", help=f"what to ask about it (default: {READ!r}); '' gives a caption")
    parser.add_argument("--questions", help="JSONL with an image (relative to the file) and a prompt in each row")
    parser.add_argument("--answers", help="where to write the rows of --questions with a prediction in each")
    parser.add_argument("--checkpoint", help="model folder (default: the newest under out/)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much of the probability (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--max-tiles", type=int, default=9, help="tiles a page is cut into at most (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the fastest there is")
    args = parser.parse_args()
    if bool(args.image) == bool(args.questions) or bool(args.questions) != bool(args.answers):
        parser.error("give either --image, or --questions with --answers")
    if args.questions and args.prompt is not None:
        parser.error("--questions brings its own prompts: leave out --prompt")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.max_tiles < 1:
        parser.error("--temperature is at least 0, --top-p in (0, 1], --max-tiles at least 1")
    if not 1 <= args.max_new_tokens <= 100_000 or not 0 <= args.seed < 2 ** 63:
        parser.error("--max-new-tokens is from 1 to 100,000, --seed from 0 to 2**63 - 1")
    if args.device == "cuda" and not torch.cuda.is_available() or args.device == "mps" and not torch.backends.mps.is_available():
        parser.error(f"--device {args.device}: this machine, or this torch, has none")
    sys.stdout.reconfigure(errors="replace")        # a terminal that cannot show a character is no reason to stop
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        folder = Path(args.checkpoint) if args.checkpoint else newest_checkpoint()
        model = AlignVLM.from_pretrained(folder).to(device).eval()
        tokenizer = Tokenizer(folder / "tokenizer.model")
        if len(tokenizer) != model.config.llm.vocab_size:
            raise InputError(f"{tokenizer.path}: {len(tokenizer)} tokens for a model of {model.config.llm.vocab_size}")
        print(f"model: {folder} on {device}", file=sys.stderr)
        if args.questions:
            answer_file(model, tokenizer, args)
        else:
            shown = 0
            for [text] in answer(model, tokenizer, [read_image(args.image)], [READ if args.prompt is None else args.prompt], **generation(args)):
                text = text.rstrip("\ufffd")       # the first bytes of a character wait for the rest of it
                print(text[shown:], end="", flush=True)
                shown = max(shown, len(text))
            print()
    except (InputError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
