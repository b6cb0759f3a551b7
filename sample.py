"""Ask a trained AlignVLM about a document.

    python sample.py --image doc.png                                    # reads the page aloud
    python sample.py --image doc.png --prompt "what is TAX?"
    python sample.py --image page1.png page2.png --prompt "which is newer?"                     # both in one prompt
    python sample.py --questions pages/questions.jsonl --answers answers.jsonl
    python sample.py --align-vocab 100 --choose-from pages/*.png        # choose the connector's words, and store them
    python sample.py --align-vocab 100 --image doc.png                  # with these words alone
    python sample.py --llm Llama-3.2-1B-Instruct --prompt "What is the capital of France?"      # the bare LLM

Without --checkpoint the newest trained model under out/ is taken. --llm is the first thing to try on new weights: a
downloaded folder, in hub format or Meta's, talks in its own chat format and sees no image.
"""
import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from data import READ, Tokenizer, Turn, encode_chat
from eval import answer, default_model
from model import AlignVLM, Llama
from vision import InputError, read_image, tile


def chat(llm: Llama, tokenizer: Tokenizer, prompt: str, **generation) -> Iterator[list[str]]:
    """The bare LLM's answer to a prompt, so far, after every token."""
    tokens, _ = encode_chat([Turn("user", [prompt])], tokenizer, [])
    x, ids = llm.embed_tokens(tokens[None].to(llm.embed_tokens.weight.device)), []          # (1, L, D)
    for [token] in llm.generate(x, [len(tokens)], tokenizer.stop, **generation):
        ids.append(token)
        yield [tokenizer.decode(ids)]


def read_questions(path: Path) -> list[dict]:
    """The rows of a JSONL file with an image, relative to the file, and a prompt in each. Raises InputError."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")      # splitlines() would also cut inside a string
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(json.loads(line))
                if not all(isinstance(rows[-1][key], str) for key in ("image", "prompt")):
                    raise TypeError("both are strings")
                if not (path.parent / rows[-1]["image"]).is_file():
                    raise InputError(f"{path}, line {number}: no file {path.parent / rows[-1]['image']}")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f'{path}, line {number}: not JSON with an "image" and a "prompt", both strings') from None
    return rows


def answer_file(model: AlignVLM, tokenizer: Tokenizer, args, **generation) -> None:
    """The rows of --questions with a `prediction` in each; written beside --answers, then renamed."""
    rows = read_questions(Path(args.questions))
    if Path(args.answers).is_dir():
        raise InputError(f"--answers {args.answers}: a folder, not a file")
    partial = Path(args.answers + ".partial")
    with partial.open("w", encoding="utf-8") as out, tqdm(total=len(rows), desc="questions") as bar:
        for first in range(0, len(rows), 16):
            batch = rows[first:first + 16]
            images = [read_image(Path(args.questions).parent / row["image"]) for row in batch]
            prompts = [row["prompt"] for row in batch]
            *_, predictions = answer(model, tokenizer, images, prompts, args.max_tiles, **generation)
            for row, prediction in zip(batch, predictions):
                out.write(json.dumps({**row, "prediction": prediction}) + "\n")
            bar.update(len(batch))
    os.replace(partial, args.answers)


def speed(llm: Llama, start: float, times: list[float]) -> str:
    """What it took: seconds until the first token, then tokens, and bytes of weights read for them, per second."""
    line = f"first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        read = sum(p.nbytes for p in llm.layers.parameters()) + llm.head.nbytes
        line += f", then {rate:.1f} tokens/s ({read * rate / 1e9:.1f} GB/s)"
    return line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", help="the document: PNG, JPEG, TIFF, ... in any mode and of any size; several are "
        "shown together")
    add("--prompt", help=f"what to ask about it (default: {READ!r}); '' gives a caption")
    add("--questions", help="JSONL with an image (relative to the file) and a prompt in each row")
    add("--answers", help="where to write the rows of --questions with a prediction in each")
    add("--align-vocab", type=int, metavar="K", help="let the connector mix only the K words that --choose-from chose "
        "for this model (default: the whole vocabulary)")
    add("--choose-from", nargs="+", metavar="IMAGE", help="choose the K words that carry the probability on these "
        "pages, store them in the model's folder and print what they change")
    add("--checkpoint", help="model folder (default: the newest under out/)")
    add("--llm", help="folder with a released Llama and its tokenizer: ask it --prompt, with no image")
    add("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from this much of the probability (default: all)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--max-tiles", type=int, default=9, help="tiles a page is cut into at most (default: %(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: the fastest there is")
    args = parser.parse_args()
    if sum(map(bool, (args.image, args.questions, args.llm, args.choose_from))) != 1 or (
            bool(args.questions) != bool(args.answers)):
        parser.error("give either --image, or --questions with --answers, or --llm with --prompt, or --choose-from")
    if args.choose_from and (args.align_vocab is None or args.prompt is not None):
        parser.error("--choose-from needs --align-vocab K, and asks no --prompt")
    if args.align_vocab is not None and (args.align_vocab < 1 or args.llm):
        parser.error("--align-vocab is at least 1, and --llm has no connector")
    if args.llm and (args.prompt is None or args.checkpoint):
        parser.error("--llm needs a --prompt and goes without --checkpoint")
    if args.questions and args.prompt is not None:
        parser.error("--questions brings its own prompts: leave out --prompt")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.max_tiles < 1:
        parser.error("--temperature is at least 0, --top-p in (0, 1], --max-tiles at least 1")
    if not 1 <= args.max_new_tokens <= 100_000 or not 0 <= args.seed < 2 ** 63:
        parser.error("--max-new-tokens is from 1 to 100,000, --seed from 0 to 2**63 - 1")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    args.device = args.device or next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[args.device]:
        parser.error(f"--device {args.device}: this machine, or this torch, has none")
    return args


def main() -> None:
    args = parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that cannot show a character is no reason to stop
    generation = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    try:
        folder = Path(args.llm or args.checkpoint or default_model())
        model = (Llama if args.llm else AlignVLM).from_pretrained(folder, device=args.device).eval()
        tokenizer = Tokenizer(folder, (model if args.llm else model.llm).config.vocab_size)
        print(f"model: {folder} on {args.device}", file=sys.stderr)
        if args.align_vocab and (kind := model.config.connector.kind) != "align":
            raise InputError(f"--align-vocab: {folder} has the connector {kind}, which mixes none of the LLM's words")
        if args.choose_from:
            pixels = [tile(read_image(file), model.config.vision, args.max_tiles) for file in args.choose_from]
            return print(json.dumps(choose_align_vocab(model, folder, pixels, args.align_vocab)))
        if args.align_vocab:
            use_align_vocab(model, folder, args.align_vocab)
        if args.questions:
            return answer_file(model, tokenizer, args, **generation)
        prompt, shown = READ if args.prompt is None else args.prompt, 0
        start, times = time.perf_counter(), []
        answers = (chat(model, tokenizer, prompt, **generation) if args.llm else
                   answer(model, tokenizer, [[read_image(path) for path in args.image]], [prompt], args.max_tiles,
                          **generation))
        for [text] in answers:
            times.append(time.perf_counter())
            text = text.rstrip("\ufffd")        # the first bytes of a character wait for the rest of it
            print(text[shown:], end="", flush=True)
            shown = max(shown, len(text))
        print()
        if not args.llm:
            del times[-1]               # answer() ends with the whole answer once more
        if times:
            print(speed(model if args.llm else model.llm, start, times), file=sys.stderr)
    except (InputError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
