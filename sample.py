"""Ask a trained AlignVLM about a document.

    python sample.py --image doc.png                                    # reads the page aloud
    python sample.py --image doc.png --prompt "what is TAX?"
    python sample.py --image page1.png page2.png --prompt "which is newer?"                     # both in one prompt
    python sample.py --image pages/ --prompt "what is TAX?"             # each image of a folder by itself, a line each
    python sample.py --questions pages/questions.jsonl --answers answers.jsonl                  # JSONL in, JSONL out
    python sample.py --image doc.png --interactive                      # read the page once, then type questions
    python sample.py --image doc.png --explain words.png                # the word that every patch is mapped to
    python sample.py --align-vocab 100 --choose-from pages/*.png        # choose the connector's words, and store them
    python sample.py --align-vocab 100 --image doc.png                  # with these words alone
    python sample.py --llm Llama-3.2-1B-Instruct --prompt "What is the capital of France?"      # the bare LLM

Without --checkpoint the newest trained model under out/ is taken, or else the one in the box, toy/stage3. --llm is the
first thing to try on new weights: a downloaded folder, in hub format or Meta's, talks in its own chat format and sees
no image.
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
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import READ, TextError, Tokenizer, encode_chat, prepare
from plumbing.examples import Example, Turn
from model import IMAGE, AlignVLM, KVCache, Llama
from paper.align_vocab import choose_align_vocab, use_align_vocab
from paper.words import explain
from plumbing.runs import IN_THE_BOX
from plumbing.settings import InputError
from plumbing.images import read_image
from vision import tile

BATCH = 16      # pages that are asked about together
MAX_QUESTION = 4096             # tokens that --interactive takes in one question


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The highest stage of the run that was trained last, of the runs out/*/stageN."""
    stages = [path.parent for path in out.glob("*/stage[123]/config.json")]
    if not stages:
        raise InputError(f"no trained model under {out}/: run `python train.py` first, or name one with --checkpoint")
    run = max(stages, key=lambda folder: (folder / "config.json").stat().st_mtime).parent
    return max(folder for folder in stages if folder.parent == run)


def default_model() -> Path:
    """The newest trained model, or else the one in the box. Raises InputError where there is neither."""
    try:
        return newest_checkpoint()
    except InputError:
        if not (IN_THE_BOX / "stage3" / "config.json").exists():
            raise
        print("nothing is trained under out/: this is the model in the box", file=sys.stderr)
        return IN_THE_BOX / "stage3"


def image_files(paths: list[str]) -> list[Path]:
    """The images of a folder, in the order of their names, or the paths as they are. Raises InputError."""
    folders = [path for path in map(Path, paths) if path.is_dir()]
    if not folders:
        return [Path(path) for path in paths]
    if len(paths) > 1:
        raise InputError(f"{folders[0]}: a folder goes alone, or else name its images")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folders[0].iterdir() if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise InputError(f"{folders[0]}: no image in this folder")
    for file in files:
        read_image(file)            # a bad one is found before anything is answered
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def answer(model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image | list[Image.Image]], prompts: list[str],
           max_tiles: int = 9, **generation) -> Iterator[list[str]]:
    """Answer each (image or images, prompt) as one batch; yields the answers so far after every token,
    and once more at the end.

    generation: what AlignVLM.generate takes (max_new_tokens, temperature, top_p, seed). An empty prompt asks for a
    caption: the user's turn is the image alone, as in stage 1.
    """
    samples = []
    for pages, prompt in zip(images, prompts):
        pages = pages if isinstance(pages, list) else [pages]
        turn = Turn("user", [IMAGE] * len(pages) + ([prompt] if prompt else []))
        samples.append(prepare(Example(pages, [turn], ""), tokenizer, model.config.vision, max_tiles,
                               tile_tokens=model.config.tile_tokens))
    ids: list[list[int]] = [[] for _ in samples]
    for step in model.generate([s.tokens for s in samples], [s.pixels for s in samples], tokenizer.stop, **generation):
        for row, token in zip(ids, step):
            row += [] if token is None else [token]
        yield [tokenizer.decode(row) for row in ids]
    yield [tokenizer.decode(row) for row in ids]


def chat(llm: Llama, tokenizer: Tokenizer, prompt: str, **generation) -> Iterator[list[str]]:
    """The bare LLM's answer to a prompt, so far, after every token."""
    return go_on(llm, tokenizer, encode_chat([Turn("user", [prompt])], tokenizer, [])[0], **generation)


def go_on(llm: Llama, tokenizer: Tokenizer, tokens: Tensor, **generation) -> Iterator[list[str]]:
    """What the LLM writes after tokens (L,), so far, after every token."""
    x, ids = llm.embed_tokens(tokens[None].to(llm.embed_tokens.weight.device)), []          # (1, L, D)
    for [token] in llm.generate(x, [len(tokens)], tokenizer.stop, **generation):
        ids.append(token)
        yield [tokenizer.decode(ids)]


def answer_each(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], prompts: list[str], what: str,
                **generation) -> Iterator[str]:
    """The answer to each prompt about the image of its own, BATCH at a time, beside a bar that says `what`."""
    with tqdm(total=len(files), desc=what) as bar:
        for first in range(0, len(files), BATCH):
            images = [read_image(file) for file in files[first:first + BATCH]]
            *_, texts = answer(model, tokenizer, images, prompts[first:first + BATCH], **generation)
            yield from texts
            bar.update(len(images))


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
                    name = str(path.parent / rows[-1]["image"])[:200]
                    raise InputError(f"{path}, line {number}: no file {name!r}")
                read_image(path.parent / rows[-1]["image"])        # a bad one is found before anything is answered
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError):
        raise InputError(f'{path}, line {number}: not JSON with an "image" and a "prompt", both strings') from None
    return rows


def answer_file(model: AlignVLM, tokenizer: Tokenizer, args, **generation) -> None:
    """The rows of --questions with a `prediction` in each; written beside --answers, then renamed."""
    rows = read_questions(Path(args.questions))
    answers = Path(args.answers).resolve()
    if answers.exists() and not answers.is_file():
        raise InputError(f"--answers {args.answers}: a folder or a device, not a file")
    files, prompts = [Path(args.questions).parent / row["image"] for row in rows], [row["prompt"] for row in rows]
    answers.parent.mkdir(parents=True, exist_ok=True)
    partial = answers.with_name(answers.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        predictions = answer_each(model, tokenizer, files, prompts, "questions", max_tiles=args.max_tiles, **generation)
        for prediction, row in zip(predictions, rows):
            out.write(json.dumps({**row, "prediction": prediction}) + "\n")
    os.replace(partial, answers)


def answer_folder(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], prompt: str, max_tiles: int,
                  **generation) -> None:
    """Ask the same about each image by itself: a line `name: answer` for each, in which a line's end is a slash."""
    texts = answer_each(model, tokenizer, files, [prompt] * len(files), "pages", max_tiles=max_tiles, **generation)
    for text, file in zip(texts, files):
        tqdm.write(f"{file.name}: {' / '.join(text.splitlines())}")


def explain_files(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], out: Path, max_tiles: int) -> None:
    """A picture of each image's words: `out`, or of several images one each, numbered."""
    for number, file in enumerate(tqdm(files, desc="explaining"), 1):
        path = out if len(files) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        explain(model, tokenizer, read_image(file), path, max_tiles, file.name)
        tqdm.write(f"{file}: the word of every patch is drawn in {path}")


class Conversation:
    """Questions about the same images, which are read once: their keys and values stay, for every question anew."""

    def __init__(self, model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image], max_tiles: int = 9):
        self.model, self.tokenizer, self.images = model, tokenizer, [IMAGE] * len(images)
        sample = prepare(Example(images, [Turn("user", self.images)], ""), tokenizer, model.config.vision, max_tiles,
                         tile_tokens=model.config.tile_tokens)
        tokens = sample.tokens[:after_images(sample.tokens)]                    # (P,), the same for every question
        with torch.inference_mode():
            x = model.embed(tokens[None], sample.pixels.to(model.llm.embed_tokens.weight))      # (1, P, D)
            self.read = KVCache(model.config.llm, 1, len(tokens), x.device, x.dtype)
            model.llm.hidden(x, None, self.read, torch.arange(len(tokens), device=x.device)[None])

    def ask(self, prompt: str, **generation) -> Iterator[list[str]]:
        """The answer so far, after every token, as `answer` gives it. Raises TextError."""
        tokens, _ = encode_chat([Turn("user", [*self.images, prompt])], self.tokenizer, [1] * len(self.images))
        tokens = tokens[after_images(tokens):]                                  # (L,)
        if len(tokens) > MAX_QUESTION:
            raise TextError(f"a question of {len(tokens):,} tokens: at most {MAX_QUESTION:,}")
        yield from go_on(self.model.llm, self.tokenizer, tokens, prefix=self.read, **generation)


def after_images(tokens: Tensor) -> int:
    """Where the text after the last image begins in a prompt's tokens (L,)."""
    return int((tokens == IMAGE).nonzero()[-1]) + 1


def converse(model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image], max_tiles: int, **generation) -> None:
    """Answer what is typed, a question a line, until an empty one or the input's end."""
    start = time.perf_counter()
    conversation = Conversation(model, tokenizer, images, max_tiles)
    print(f"read in {time.perf_counter() - start:.2f} s; an empty line ends", file=sys.stderr)
    while True:
        try:
            question = input("> ")
            if not question.strip():
                return
            start = time.perf_counter()
            times = show(conversation.ask(question, **generation))
        except EOFError:
            return print()
        except TextError as error:
            print(error, file=sys.stderr)
            continue
        if times:
            print(speed(model.llm, start, times), file=sys.stderr)


def show(answers: Iterator[list[str]]) -> list[float]:
    """Print an answer as it grows; returns when each of its tokens came."""
    shown, times = 0, []
    for [text] in answers:
        times.append(time.perf_counter())
        text = text.rstrip("\ufffd")        # the first bytes of a character wait for the rest of it
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
    print()
    return times


def speed(llm: Llama, start: float, times: list[float]) -> str:
    """What it took: seconds until the first token, then tokens, and bytes of weights read for them, per second."""
    line = f"first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        read = sum(p.nbytes for p in llm.layers.parameters()) + llm.head.nbytes
        line += f", then {rate:.1f} tokens/s ({read * rate / 1e9:.1f} GB/s)"
    return line


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", help="the document: PNG, JPEG, TIFF, ... in any mode and of any size; several are "
        "shown together; of a folder each image is answered by itself")
    add("--prompt", help=f"what to ask about it (default: {READ!r}); '' gives a caption")
    add("--interactive", action="store_true", help="read --image once, then answer the questions that are typed, a "
        "line each, until an empty one; none knows of those before it")
    add("--explain", type=Path, metavar="OUT.png", help="draw --image with the word that each patch is mapped to, the "
        "more opaque the likelier; of several images OUT-1.png, OUT-2.png, ... (Align connector only)")
    add("--questions", help="JSONL with an image (relative to the file) and a prompt in each row")
    add("--answers", help="where to write the rows of --questions with a prediction in each")
    add("--align-vocab", type=int, metavar="K", help="let the connector mix only the K words that --choose-from chose "
        "for this model (default: the whole vocabulary)")
    add("--choose-from", nargs="+", metavar="IMAGE", help="choose the K words that carry the probability on these "
        "pages, store them in the model's folder and print what they change")
    add("--checkpoint", help="model folder (default: the newest under out/, else the one in the box)")
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
    if (args.interactive or args.explain) and (not args.image or args.prompt is not None):
        parser.error("--interactive and --explain need an --image and go without --prompt")
    if args.interactive and (args.explain or any(map(os.path.isdir, args.image))):
        parser.error("--interactive goes without --explain, and its --image is no folder")
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
    # A terminal that cannot show a character is no reason to stop; nor is a question that is no text, which the
    # tokenizer refuses by itself.
    for stream, errors in (sys.stdout, "replace"), (sys.stdin, "surrogateescape"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    generation = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    try:
        folder = Path(args.llm or args.checkpoint or default_model())
        model = (Llama if args.llm else AlignVLM).from_pretrained(folder, device=args.device).eval()
        llm = model if args.llm else model.llm
        llm.pack()
        tokenizer = Tokenizer(folder, llm.config.vocab_size)
        print(f"model: {folder} on {args.device}", file=sys.stderr)
        if args.align_vocab and (kind := model.config.connector.kind) != "align":
            raise InputError(f"--align-vocab: {folder} has the connector {kind}, which mixes none of the LLM's words")
        if args.choose_from:
            pixels = [tile(read_image(file), model.config.vision, args.max_tiles)
                      for file in image_files(args.choose_from)]
            return print(json.dumps(choose_align_vocab(model, folder, pixels, args.align_vocab)))
        if args.align_vocab:
            use_align_vocab(model, folder, args.align_vocab)
        if args.questions:
            return answer_file(model, tokenizer, args, **generation)
        prompt = READ if args.prompt is None else args.prompt
        if args.llm:
            start = time.perf_counter()
            times = show(chat(llm, tokenizer, prompt, **generation))
        else:
            files = image_files(args.image)
            if args.explain:
                return explain_files(model, tokenizer, files, args.explain, args.max_tiles)
            if os.path.isdir(args.image[0]):
                return answer_folder(model, tokenizer, files, prompt, args.max_tiles, **generation)
            images = [read_image(file) for file in files]
            if args.interactive:
                return converse(model, tokenizer, images, args.max_tiles, **generation)
            start = time.perf_counter()
            times = show(answer(model, tokenizer, [images], [prompt], args.max_tiles, **generation))[:-1]
        if times:
            print(speed(llm, start, times), file=sys.stderr)
    except (InputError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
