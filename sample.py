"""Ask a trained AlignVLM about a document.

    python sample.py --image doc.png                                # reads the page aloud
    python sample.py --image doc.png --prompt "what is the total?"
    python sample.py --image page1.png page2.png --prompt "which is newer?"     # both in one prompt
    python sample.py --image doc.pdf --pages 2-3                    # some pages of a PDF or TIFF
    python sample.py --image pages/ --prompt "what is the total?"   # each of a folder by itself
    python sample.py --questions pages/questions.jsonl --answers answers.jsonl
    python sample.py --image doc.png --interactive                  # reads it once; type questions
    python sample.py --image doc.png --prompt "who signed?" --explain page.html     # and see why
    python sample.py --checkpoint out/toy/stage3 --image doc.png    # a model that you have trained
    python sample.py --checkpoint out/toy/stage3 --image doc.png --align-vocab  # paper.align_vocab
    python sample.py --llm meta-llama/Llama-3.2-1B-Instruct --prompt "What is the Moon?"

Without --checkpoint the shipped model answers, reader/stage3. --llm asks the bare LLM of a folder,
or of a name on the hub: the first thing to try on new weights.
"""
import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import READ, TextError, Tokenizer, encode_chat, prepare_question
from model import CIRCLES, AlignVLM, AlignVLMConfig, Llama, goes_in_circles
from plumbing import fast
from plumbing.examples import IMAGE, Turn
from plumbing.images import read_pages
from plumbing.settings import SEVERAL, InputError, a_path, tile_limit
from plumbing.texts import in_one_line
from plumbing.weights import model_folder
from vision import choose_grid, coverage, tile_boxes

SHIPPED = Path(__file__).parent / "reader" / "stage3"   # the model that comes with this repository
BATCH = 16                      # pages that are asked about together
MAX_QUESTION = 4096             # tokens that --interactive takes in one question
KEPT = 0.5                      # of a page's pixels in its tiles: below that the user is told

# -------------------------------------------------------------------------------------------------
# From a page to an answer


def answer(model: AlignVLM, tokenizer: Tokenizer,
           images: Iterable[Image.Image | list[Image.Image]], prompts: list[str],
           max_tiles: int | None = None, **generation) -> Iterator[list[str]]:
    """Answer each (image or images, prompt), all of them as one batch.

    Yields the answers so far after every token, and once more at the end.

    generation: what AlignVLM.generate takes (max_new_tokens, temperature, top_p, seed).
    An empty prompt leaves the image alone in the user's turn: so stage 1 shows a caption's image.
    """
    questions = []
    for pages, prompt in zip(images, prompts):
        if not isinstance(pages, list):
            pages = [pages]
        questions.append(prepare_question(model, tokenizer, pages, prompt, max_tiles))
    tokens, pixels = zip(*questions)                            # (L_b,), (T_b, 3, S, S) of each

    answers: list[list[int]] = [[] for _ in questions]
    for step in model.generate(tokens, pixels, tokenizer.stop, **generation):
        for ids, token in zip(answers, step):
            if token is not None:
                ids.append(token)
        yield [tokenizer.decode(ids) for ids in answers]
    yield [tokenizer.decode(ids) for ids in answers]


def continue_text(llm: Llama, tokenizer: Tokenizer, tokens: Tensor,
                  **generation) -> Iterator[list[str]]:
    """What the LLM writes after tokens (L,), so far, after every token."""
    x = llm.embed_tokens(tokens[None].to(llm.embed_tokens.weight.device))       # (1, L, D)
    ids = []
    for [token] in llm.generate(x, [len(tokens)], tokenizer.stop, **generation):
        ids.append(token)
        yield [tokenizer.decode(ids)]


# -------------------------------------------------------------------------------------------------
# A conversation: the pages are read once


class Conversation:
    """Questions about the same images, which a cache keeps; none knows of those before it."""

    def __init__(self, model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image],
                 max_tiles: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.n_images = len(images)
        tokens, pixels = prepare_question(model, tokenizer, images, "", max_tiles)
        tokens = tokens[:after_images(tokens)]          # (P,), those of every question
        with torch.inference_mode():
            x = model.embed(tokens[None], pixels)                           # (1, P, D)
            self.prefix = model.llm.new_cache(1, len(tokens))
            model.llm.hidden(x, cache=self.prefix)

    def ask(self, prompt: str, **generation) -> Iterator[list[str]]:
        """The answer so far, after every token. Raises TextError for a question that is no text, or
        is too long."""
        turn = Turn("user", [IMAGE] * self.n_images + [prompt])
        tokens, _ = encode_chat([turn], self.tokenizer, [1] * self.n_images)
        tokens = tokens[after_images(tokens):]                                  # (L,)
        if len(tokens) > MAX_QUESTION:
            raise TextError(f"a question of {len(tokens):,} tokens: at most {MAX_QUESTION:,}")
        yield from continue_text(self.model.llm, self.tokenizer, tokens, prefix=self.prefix,
                                 **generation)


def after_images(tokens: Tensor) -> int:
    """Where the text after the last image begins in a prompt's tokens (L,)."""
    return int((tokens == IMAGE).nonzero()[-1]) + 1


def converse(model: AlignVLM, tokenizer: Tokenizer, images: list[Image.Image],
             max_tiles: int | None, **generation) -> None:
    """Answer what is typed, a question a line, until an empty one or the input's end."""
    if sys.stdin is None:
        raise InputError("--interactive: there is no input to read questions from")
    start = time.perf_counter()
    conversation = Conversation(model, tokenizer, images, max_tiles)
    seconds = time.perf_counter() - start
    print(f"read in {seconds:.2f} s; an empty line ends", file=sys.stderr)
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if not question.strip():
            return
        start = time.perf_counter()
        try:
            times = show(conversation.ask(question, **generation))
        except TextError as error:
            print(error, file=sys.stderr)
        else:
            print_speed(model.llm, start, times)


def show(answers: Iterator[list[str]]) -> list[float]:
    """Print an answer as it grows, and say so if it was ended because it goes in circles; returns
    when each of its tokens came."""
    shown = 0
    times, pieces = [], []
    for [text] in answers:
        times.append(time.perf_counter())
        text = text.rstrip("\ufffd")        # the first bytes of a character wait for the rest of it
        pieces.append(text[shown:])
        print(pieces[-1], end="", flush=True)
        shown = max(shown, len(text))
    print()
    if goes_in_circles(pieces) or goes_in_circles(pieces[:-1]):     # `answer` says the last twice
        print(f"ended: the last {CIRCLES} tokens repeat themselves", file=sys.stderr)
    return times


def describe(pages: list[Image.Image], config: AlignVLMConfig, max_tiles: int | None) -> None:
    """Say how much several pages are, and whether tiles have less than KEPT of one."""
    if len(pages) > 1:
        n_tiles = sum(len(tile_boxes(*page.size, config.vision, max_tiles)) for page in pages)
        print(f"{len(pages)} pages together: {n_tiles} tiles, {n_tiles * config.tile_tokens:,} "
              "visual tokens", file=sys.stderr)
    kept, n, (width, height) = kept_of(pages, config, max_tiles)
    if kept < KEPT:
        tiles = f"{n} tile{'s' if n > 1 else ''} of {config.vision.image_size}"
        print(f"a page of {width} x {height} pixels becomes {tiles}, {kept:.0%} of it: "
              "small type is lost (crop it)", file=sys.stderr)


def kept_of(pages: list[Image.Image], config: AlignVLMConfig,
            max_tiles: int | None) -> tuple[float, int, tuple[int, int]]:
    """The least share of a page's pixels that its tiles keep, how many they are, and that page's
    size."""
    side = config.vision.image_size
    found = []
    for page in pages:
        grid = choose_grid(*page.size, side, max_tiles or config.vision.max_tiles)
        found.append((coverage(*page.size, side, *grid), math.prod(grid), page.size))
    return min(found)


def print_speed(llm: Llama, start: float, times: list[float]) -> None:
    """Say how long the first token took, and how fast the others and the weights for them came."""
    if not times:
        return
    line = f"first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        read = sum(p.nbytes for p in llm.layers.parameters()) + llm.head.nbytes     # for a token
        line += f", then {rate:.1f} tokens/s ({read * rate / 1e9:.1f} GB/s)"
    print(line, file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Files of questions, and folders of pages


def image_files(paths: list[str], chosen: str | None) -> list[Path]:
    """The images of a folder, in the order of their names, or the paths as they are.

    Those of a folder are read first: a bad one is found before any answer. chosen: --pages. Raises
    InputError.
    """
    directories = [path for path in paths if os.path.isdir(path)]
    if not directories:
        return [Path(path) for path in paths]
    if len(paths) > 1:
        raise InputError(f"{directories[0]}: a folder goes alone, or else name its images")
    from plumbing.folders import UNREAD_SUFFIXES, is_foreign
    from plumbing.folders import image_files as images_in
    files = images_in(Path(directories[0]))
    unread = [name for name in sorted(os.listdir(directories[0]))
              if name.lower().endswith(UNREAD_SUFFIXES) and not is_foreign(name)]
    if unread:
        print(f"left out, since Pillow cannot read them: {len(unread)}, first "
              f"{in_one_line(unread[0])} (save as JPEG)", file=sys.stderr)
    for file in files:
        read_pages(file, chosen)
    return files


def answer_each(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], prompts: list[str],
                chosen: str | None = None, **options) -> Iterator[str]:
    """The answer to each prompt about the image of its own, BATCH at a time, beside a bar.

    chosen: --pages. options, here and below: max_tiles, seed, and what else `answer` takes.
    """
    shrunk = {}                 # files with a page that has lost much of itself, in their order
    is_cut = False              # whether an answer was ended by --max-new-tokens

    def pages_of(file: Path) -> list[Image.Image]:
        pages = read_pages(file, chosen)
        if kept_of(pages, model.config, options["max_tiles"])[0] < KEPT:
            shrunk[file] = True
        return pages

    with tqdm(total=len(files), desc="answering") as bar:
        for first in range(0, len(files), BATCH):
            some = files[first:first + BATCH]
            images = (pages_of(file) for file in some)      # one at a time: they may be large
            # Each batch draws from a seed of its own.
            seeded = {**options, "seed": options["seed"] + first}
            some_prompts = prompts[first:first + BATCH]
            # The last texts are whole; `written` counts the tokens of the longest.
            for written, texts in enumerate(answer(model, tokenizer, images, some_prompts,
                                                   **seeded)):
                pass
            is_cut |= written == options["max_new_tokens"]
            yield from texts
            bar.update(len(some))
    if shrunk:
        first = in_one_line(str(next(iter(shrunk))))
        print(f"{len(shrunk)} of {len(set(files))} images lose small type, first {first}: tiles "
              f"have less than {KEPT:.0%} of them (crop them)", file=sys.stderr)
    if is_cut:
        print(f"cut after {options['max_new_tokens']:,} tokens: one answer or several "
              "(--max-new-tokens)", file=sys.stderr)


def answer_questions(model: AlignVLM, tokenizer: Tokenizer, questions: Path, answers: Path,
                     **options) -> None:
    """Write the rows of `questions`, each with a `prediction`, beside `answers`, then rename."""
    from plumbing.files import refuse_inputs, replacing
    from plumbing.questions import read_questions
    rows = read_questions(questions)
    files = [questions.parent / row["image"] for row in rows]
    refuse_inputs(answers, files)
    prompts = [row["prompt"] for row in rows]
    if answers.exists() and not answers.is_file():
        raise InputError(f"--answers {answers}: a folder or a device, not a file")
    answers.parent.mkdir(parents=True, exist_ok=True)
    with (replacing(answers, f".{os.getpid()}") as partial,
          partial.open("w", encoding="utf-8") as out):
        for prediction, row in zip(answer_each(model, tokenizer, files, prompts, **options), rows):
            out.write(json.dumps({**row, "prediction": prediction}) + "\n")


def answer_folder(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], prompt: str,
                  **options) -> None:
    """Ask the same about each image: a line `name: answer` each, its own line ends as slashes."""
    prompts = [prompt] * len(files)
    for text, file in zip(answer_each(model, tokenizer, files, prompts, **options), files):
        tqdm.write(f"{in_one_line(file.name)}: {' / '.join(text.splitlines())}")


# -------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", **SEVERAL, help="the document: PNG, JPEG, TIFF, PDF (pip install pypdfium2), "
        "..., of up to 100 million pixels; several, like the pages of a file, are shown together; "
        "of a folder each file is answered by itself")
    add("--pages", help="of each --image only these, counted from 1: 2, 2-3, 2,5-7")
    add("--prompt", help=f"what to ask about it (default: {READ!r}); '' shows the image "
        "alone: a model that has learnt captions gives one")
    add("--interactive", action="store_true", help="read --image once, then answer the questions "
        "that are typed, a line each, until an empty one; none knows of those before it")
    add("--explain", type=a_path, metavar="OUT.html", help="a document in which a browser shows "
        "what each patch became and where the LLM looked; or OUT.png, a picture of each patch's "
        "token")
    add("--questions", type=Path, metavar="JSONL", help="rows with an image, relative to the file, "
        "and a prompt")
    add("--answers", type=a_path, metavar="JSONL", help="the same rows, each with a prediction")
    add("--align-vocab", action="store_true", help="mix only the tokens that `python -m "
        "paper.align_vocab` chose for this model")
    add("--checkpoint", help="model folder, or a name on the hub, `owner/name` (default: the "
        "shipped model, reader/stage3)")
    add("--llm", help="folder or name of a released Llama: ask it --prompt, without an image")
    add("--max-new-tokens", type=int, default=3000, help="longest answer; a token of the shipped "
        "model is a character (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="above temperature 0: draw from the likeliest "
        "tokens that hold this share of the probability (default: %(default)s, all)")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--max-tiles", type=tile_limit, help="of a page, at most (default: what the model's "
        "config.json says, 9 for most, 1 for the shipped model)")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: the fastest there is")
    args = parser.parse_args()
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "cpu": True}         # the fastest first
    args.device = args.device or next(device for device in there if there[device])
    if not there[args.device]:
        parser.error(f"--device {args.device}: this machine, or this torch, has none")
    for wrong, what_to_do in impossible(args):
        if wrong:
            parser.error(what_to_do)
    return args


def impossible(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """What can be wrong with the options, whether it is, and what to do then."""
    sources = sum(source is not None for source in (args.image, args.questions, args.llm))
    folders = [path for path in args.image or [] if os.path.isdir(path)]
    explained = args.explain and args.explain.suffix.lower()
    return [
        (sources != 1 or (args.questions is None) != (args.answers is None),
         "give either --image, or --questions with --answers, or --llm with --prompt"),
        (args.llm is not None and (args.prompt is None or args.checkpoint or args.align_vocab),
         "--llm needs a --prompt and goes without --checkpoint and --align-vocab"),
        (args.questions and args.prompt is not None,
         "--questions brings its own prompts: leave out --prompt"),
        ((args.interactive or args.explain) and not args.image,
         "--interactive and --explain need an --image"),
        (args.pages is not None and not args.image, "--pages needs an --image"),
        (args.pages == "", "--pages is empty: say 2, 2-3 or 2,5-7"),
        (explained not in (None, ".html") and (explained != ".png" or args.prompt is not None),
         "--explain writes OUT.html, with an answer, or OUT.png, which goes without --prompt"),
        (args.interactive and (args.explain or folders or args.prompt is not None),
         "--interactive goes without --prompt and --explain, and its --image is no folder"),
        (args.temperature != 0 and not 1e-6 <= args.temperature < math.inf,
         "--temperature is 0, or at least 0.000001"),
        (not 0 < args.top_p <= 1, "--top-p is above 0, and at most 1"),
        (not 0 <= args.seed < 2 ** 63, "--seed is from 0 to 2**63 - 1"),
        (not 1 <= args.max_new_tokens <= 100_000, "--max-new-tokens is from 1 to 100,000"),
    ]


def ask_llm(folder: str, args: argparse.Namespace, **generation) -> None:
    """--llm: the bare LLM's answer."""
    llm = Llama.from_pretrained(folder, device=args.device).eval()
    fast.use(llm, inference=True)
    tokenizer = Tokenizer(folder, llm.config.vocab_size)
    print(f"model: {folder} on {args.device}", file=sys.stderr)
    tokens, _ = encode_chat([Turn("user", [args.prompt])], tokenizer, [])       # (L,)
    start = time.perf_counter()
    times = show(continue_text(llm, tokenizer, tokens, **generation))
    print_speed(llm, start, times)


def ask_model(folder: str | Path, args: argparse.Namespace, **generation) -> None:
    """--questions or --image: a file of answers, a picture, a conversation, or an answer."""
    if args.answers or args.explain:
        from plumbing.files import refuse_inputs
        inputs = [*model_folder(folder).glob("*"), *map(Path, args.image or [args.questions])]
        refuse_inputs(args.answers or args.explain, inputs)
    model = AlignVLM.from_pretrained(folder, device=args.device).eval()
    tokenizer = Tokenizer(folder, model.config.llm.vocab_size)
    print(f"model: {folder} on {args.device}", file=sys.stderr)
    if args.align_vocab:
        from paper.align_vocab import use_align_vocab
        use_align_vocab(model, folder)
    fast.use(model, inference=True)
    options = {"max_tiles": args.max_tiles, **generation}
    if args.questions:
        return answer_questions(model, tokenizer, args.questions, args.answers, **options)
    files = image_files(args.image, args.pages)
    together = not os.path.isdir(args.image[0])
    prompt = READ if args.prompt is None else args.prompt
    if args.explain:
        from paper.explorer import explain
        return explain(model, tokenizer, files, args.explain, prompt, together, args.pages,
                       **options)
    if not together:
        return answer_folder(model, tokenizer, files, prompt, chosen=args.pages, **options)
    images = [page for file in files for page in read_pages(file, args.pages)]
    describe(images, model.config, args.max_tiles)
    if args.interactive:
        return converse(model, tokenizer, images, **options)
    start = time.perf_counter()
    *times, _ = show(answer(model, tokenizer, [images], [prompt], **options))
    print_speed(model.llm, start, times)
    if len(times) == generation["max_new_tokens"]:
        print(f"cut after {len(times):,} tokens (--max-new-tokens)", file=sys.stderr)


def main() -> None:
    args = parse_args()
    # A terminal that cannot show a character is no reason to stop; nor is a question that is no
    # text, which the tokenizer refuses by itself.
    for stream, errors in (sys.stdout, "replace"), (sys.stdin, "surrogateescape"):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
                  "top_p": args.top_p, "seed": args.seed}
    sys.stderr = sys.stderr or open(os.devnull, "w")        # a daemon has none
    try:
        if args.llm is not None:
            ask_llm(args.llm, args, **generation)
        else:
            ask_model(SHIPPED if args.checkpoint is None else args.checkpoint, args, **generation)
    except (InputError, OSError) as error:
        print(in_one_line(f"sample.py: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
