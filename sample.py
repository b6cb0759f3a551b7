"""Ask a trained AlignVLM about a document.

    python sample.py --image doc.png                                    # reads the page aloud
    python sample.py --image doc.png --prompt "what is TAX?"
    python sample.py --questions pages/questions.jsonl --answers answers.jsonl
    python sample.py --llm Llama-3.2-1B-Instruct --prompt "What is the capital of France?"      # the bare LLM

Without --checkpoint the newest trained model under out/ is taken. --llm is the first thing to try on new weights: a
downloaded folder, in hub format or Meta's, talks in its own chat format and sees no image.
"""
import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import READ, Example, TextError, Tokenizer, Turn, encode_chat, prepare
from model import IMAGE, AlignVLM, Llama
from vision import CheckpointError, ImageError, read_image


class InputError(ValueError):
    """Bad input from the command line; the message is one line that says what to do."""


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The latest stage of the run that was trained last under out/<run>/stageN."""
    stages = [path.parent for path in out.glob("*/stage[123]/config.json")]
    if not stages:
        raise InputError(f"no trained model under {out}/: run `python train.py` first, or name one with --checkpoint")
    return max(stages, key=lambda folder: (folder / "config.json").stat().st_mtime)


def answer(model: AlignVLM, tokenizer: Tokenizer, image_file, prompt: str, args) -> Iterator[str]:
    """The answer to one prompt about one image, in the pieces in which it becomes readable."""
    image = read_image(image_file)
    example = Example([image], [Turn("user", [IMAGE, prompt] if prompt else [IMAGE])], str(image_file))
    sample = prepare(example, tokenizer, model.config.vision, args.max_tiles)
    return readable(model.generate([sample.tokens], [sample.pixels], tokenizer.stop, args.max_new_tokens,
                                   args.temperature, args.top_p, args.seed), tokenizer)


def chat(llm: Llama, tokenizer: Tokenizer, prompt: str, args) -> Iterator[str]:
    """The bare LLM's answer to a prompt."""
    tokens, _ = encode_chat([Turn("user", [prompt])], tokenizer, [])
    x = llm.embed_tokens(tokens[None].to(args.device))                  # (1, L, D)
    return readable(llm.generate(x, [len(tokens)], tokenizer.stop, args.max_new_tokens,
                                 args.temperature, args.top_p, args.seed), tokenizer)


def readable(steps: Iterator[list[int]], tokenizer: Tokenizer) -> Iterator[str]:
    ids, shown = [], 0
    for [token] in steps:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):         # the first bytes of a character wait for the rest of it
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def answer_file(model: AlignVLM, tokenizer: Tokenizer, args) -> None:
    """JSONL in (image, prompt, ...), the same rows with `prediction` out; written beside, then renamed."""
    questions = Path(args.questions)
    try:
        rows = [json.loads(line) for line in questions.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{questions}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{questions}: not JSON lines ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not isinstance(row.get("prompt"), str):
            raise InputError(f'{questions}: row {number} needs "image" and "prompt", both strings')
    partial = Path(args.answers + ".partial")
    with partial.open("w") as out:
        for row in tqdm(rows, desc="questions"):
            prediction = "".join(answer(model, tokenizer, questions.parent / row["image"], row["prompt"], args))
            out.write(json.dumps({**row, "prediction": prediction}, ensure_ascii=False) + "\n")
    os.replace(partial, args.answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="the document: PNG, JPEG, TIFF, ... in any mode and of any size")
    parser.add_argument("--prompt", help=f"what to ask about it (default: {READ!r}); '' gives a caption")
    parser.add_argument("--questions", help="JSONL with an image (relative to the file) and a prompt in each row")
    parser.add_argument("--answers", help="where to write the rows of --questions with a prediction in each")
    parser.add_argument("--checkpoint", help="model folder (default: the newest under out/)")
    parser.add_argument("--llm", help="folder with a released Llama and its tokenizer: ask it --prompt, with no image")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much of the probability (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--max-tiles", type=int, default=9, help="tiles a page is cut into at most (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the fastest there is")
    args = parser.parse_args()
    if sum(map(bool, (args.image, args.questions, args.llm))) != 1 or bool(args.questions) != bool(args.answers):
        parser.error("give either --image, or --questions with --answers, or --llm with --prompt")
    if args.llm and (args.prompt is None or args.checkpoint):
        parser.error("--llm needs a --prompt and goes without --checkpoint")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1 or args.max_tiles < 1:
        parser.error("--temperature is at least 0, --top-p in (0, 1], --max-new-tokens and --max-tiles at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        folder = Path(args.llm or args.checkpoint or newest_checkpoint())
        model = (Llama if args.llm else AlignVLM).from_pretrained(folder, device=args.device).eval()
        tokenizer = Tokenizer(folder, (model if args.llm else model.llm).config.vocab_size)
        print(f"model: {folder} on {args.device}", file=sys.stderr)
        if args.questions:
            answer_file(model, tokenizer, args)
        else:
            prompt = READ if args.prompt is None else args.prompt
            for piece in (chat(model, tokenizer, prompt, args) if args.llm else
                          answer(model, tokenizer, args.image, prompt, args)):
                print(piece, end="", flush=True)
            print()
    except (InputError, ImageError, CheckpointError, TextError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
