"""How well a model reads folders of pages, and answers about them, beside Tesseract.

    python -m reader.score --checkpoint out/reader/stage3 reader/printed
    python -m reader.score --tesseract reader/printed           # apt-get install tesseract-ocr

A folder has images and questions.jsonl: image, kind, text, prompt and answer of each. Read aloud,
a page scores its share of wrong characters (Levenshtein's distance over the text's length, line
breaks and spaces being one); an answer is right or wrong.
"""
import argparse
import json
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from data import READ, Tokenizer, prepare
from model import AlignVLM
from plumbing import fast
from plumbing.examples import IMAGE, Example, Turn
from plumbing.images import read_image
from plumbing.processes import run_main
from plumbing.settings import InputError


def distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or exchange between two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def plain(text: str) -> str:
    """With single spaces in the place of line breaks and wider gaps."""
    return " ".join(text.split())


def rows_of(folder: Path) -> list[dict]:
    """The questions of a folder. Raises InputError."""
    try:
        lines = (folder / "questions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        if all({"image", "text", "prompt", "answer", "kind"} <= row.keys() for row in rows):
            return rows
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/questions.jsonl: {error}") from None
    raise InputError(f"{folder}/questions.jsonl: image, kind, text, prompt and answer are needed")


def model_reader(folder: Path, most: int) -> Callable[[Path, str], str]:
    """What answers a prompt about an image: the model of a folder, greedily."""
    model = AlignVLM.from_pretrained(folder, torch.float32)
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    fast.use(model, inference=True)

    def answer(image: Path, prompt: str) -> str:
        example = Example([read_image(image)], [Turn("user", [IMAGE, prompt])], str(image))
        sample = prepare(example, tokenizer, model.config.vision)
        steps = model.generate([sample.tokens], [sample.pixels], tokenizer.stop, most)
        return tokenizer.decode([ids[0] for ids in steps])

    return answer


def tesseract(image: Path, prompt: str) -> str:
    """Tesseract's reading of an image."""
    command = ["tesseract", image, "-", "--psm", "6"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise InputError("tesseract is not installed: apt-get install tesseract-ocr") from None


def score(folder: Path, answer: Callable[[Path, str], str], asks: bool, show: bool) -> dict:
    """Kind -> wrong and all characters, right and all answers."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows_of(folder):
        read, gold = plain(answer(folder / row["image"], READ)), plain(row["text"])
        numbers = [distance(read, gold), len(gold), 0, 0]
        if asks and row["prompt"] != READ:
            said = answer(folder / row["image"], row["prompt"])
            numbers[2:] = plain(said) == plain(row["answer"]), 1
        if show:
            print(f"{row['image']}: {read[:200]!r}")
        for kind in (row["kind"], "all"):
            counts[kind] = [a + b for a, b in zip(counts[kind], numbers)]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a model's folder")
    add("--tesseract", action="store_true", help="score Tesseract 5 too (it answers nothing)")
    add("--max-new-tokens", type=int, default=1500, help="of a page (default: %(default)s)")
    add("--show", action="store_true", help="print what was read")
    add("folders", type=Path, nargs="+", help="pages with their questions.jsonl")
    args = parser.parse_args()
    readers = {}
    if args.checkpoint:
        readers["model"] = model_reader(args.checkpoint, args.max_new_tokens)
    if args.tesseract:
        readers["tesseract"] = tesseract
    if not readers:
        parser.error("nothing reads: give --checkpoint or --tesseract")
    for folder in args.folders:
        for name, answer in readers.items():
            counts = score(folder, answer, name == "model", args.show)
            for kind, (wrong, of, right, asked) in sorted(counts.items()):
                answers = f", {right} of {asked} answers" if asked else ""
                print(f"{folder} {name} {kind}: {wrong / of:.1%} of characters wrong{answers}")


if __name__ == "__main__":
    run_main(main)
