"""The reader's lessons: pages as samples for the LLM alone (stage 0) and for the paper's stages.

Stage 0's LLM meets no image. In an image's place it gets what an Align connector would make of a
page that was read well: each patch a mixture of the embeddings of its characters, with weights that
fall in reading order, so that a mixture says which comes first.
"""
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import IGNORE, READ, Sample, Tokenizer, encode_chat, prepare
from plumbing.examples import IMAGE, Example, Turn
from plumbing.streams import Position, numbered_draws
from plumbing.tokenizers import write_tokenizer_model
from reader.drawing import BLANK, CHARACTERS, SLOTS, Page
from reader.fonts import BESIDES
from reader.pages import GRIDS, KINDS, write_page
from vision import SigLIPConfig, choose_grid

# The kinds of pages that are read aloud, and of those that are mostly asked about. More often come
# those where a reader loses its place, and those that have many answers.
TO_READ = (*KINDS, "article", "columns", "table", "notes", "snippets", "snippets", "echoes",
           "facts")
TO_ASK = (*2 * ("receipt", "invoice", "letter", "form", "table", "screenshot", "facts"), "article",
          "columns")
# Of a patch's mixture, in reading order. What a slot without a character has goes to the blank
# token, so that "l" and "ll" are not the same; no two sums of them are equal.
WEIGHTS = (0.52, 0.26, 0.14, 0.08)
BLANK_TOKEN, SMUDGE_TOKEN = 0, 1        # bytes that no text has


def write_tokenizer(path: Path) -> None:
    """The reader's tokenizer.model: all bytes, characters of several bytes, and a blank line."""
    write_tokenizer_model(path, [*BESIDES, "\n\n"])


def class_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The token of each class of a slot: (N_CLASSES,)."""
    ids = [tokenizer.encode(c) for c in CHARACTERS]
    if any(len(i) != 1 for i in ids):
        raise ValueError("a character of more than one token")
    return np.array([BLANK_TOKEN, SMUDGE_TOKEN] + [i[0] for i in ids])


def mixtures(rng: random.Random, classes: np.ndarray, tokens: np.ndarray,
             doubt: float) -> tuple[np.ndarray, np.ndarray]:
    """classes (K, P, SLOTS), K views of one page, each shifted a bit -> token ids and weights
    (P, K * SLOTS + 1). The weights sum to one.

    doubt: how far the weights are off, and how often another character is mixed in, as by an
    encoder that is not sure.
    """
    numbers = np.random.default_rng(rng.getrandbits(32))
    ids = tokens[classes]                                                   # (K, P, SLOTS)
    weights = np.broadcast_to(np.array(WEIGHTS, np.float32), classes.shape)
    # The K views of a patch side by side: (P, K * SLOTS) each.
    classes, ids, weights = (np.concatenate(x, -1) for x in (classes, ids, weights))
    weights = weights * np.exp(0.6 * doubt * numbers.standard_normal(classes.shape))
    other = tokens[numbers.integers(0, len(tokens), (*classes.shape[:-1], 1))]          # (P, 1)
    share = numbers.random(other.shape) ** 4 * (numbers.random(other.shape) < doubt)    # (P, 1)
    share[(classes[..., :1] == BLANK) & (numbers.random(other.shape) < 0.9)] = 0
    weights = np.concatenate([weights / weights.sum(-1, keepdims=True) * (1 - share), share], -1)
    return np.concatenate([ids, other], -1), weights.astype(np.float32)


# Who is asked for these has to find a place by a word that stands there, and no more.
FOR_A_LINE = ["which line has {}?", "read the line with {}", "which line says {}?"]
FOR_THE_NEXT_LINE = ["which line comes after the one with {}?", "what is the line after {}?"]
FOR_THE_REST = ["what comes after {}?", "what stands behind {}?", "what is next to {}?"]


def places(rng: random.Random, page: Page, most: int) -> list[tuple[str, str]]:
    """Up to `most` prompts, with their answers, that name one or two words of a line and ask for
    that line, for what stands behind them in it, or for the next line. What is named stands on the
    page once. Every page has such questions; few kinds have many others."""
    text, found = page.text.lower(), {}
    for i in rng.sample(range(len(page.lines)), len(page.lines)):
        line = page.lines[i].split()
        if not line:
            continue
        n = rng.randint(1, min(2, len(line)))
        at = rng.randint(0, len(line) - n)
        named, rest = " ".join(line[at:at + n]).strip(" .,:;"), " ".join(line[at + n:])
        if len(named) < 3 or text.count(named.lower()) > 1:
            continue
        asks = [(FOR_A_LINE, page.lines[i])]
        if rest:
            asks += [(FOR_THE_REST, rest)] * 2
        if i + 1 < len(page.lines):
            asks += [(FOR_THE_NEXT_LINE, page.lines[i + 1])]
        prompts, answer = rng.choice(asks)
        if len(answer) <= 60:
            found[rng.choice(prompts).format(rng.choice([named, named.lower()]))] = answer
        if len(found) == most:
            break
    return list(found.items())


def turns_about(rng: random.Random, pages: list[Page], read: float, ask: float,
                most: int = 4, least: int = 0) -> list[Turn]:
    """The pages read aloud, some of their questions, or both, with the reading first or last.

    Of samples with questions a share `read` has the pages read aloud and no more, a share `ask` up
    to `most` questions and no more, the rest both; without a question all are read aloud. Several
    turns cost the images once. A prompt that two pages share is not asked. least: where a single
    page that is asked about has fewer questions of its own, `places` adds as many as it can.
    """
    prompts = Counter(prompt for page in pages for prompt, _ in page.questions)
    questions = [(prompt, answer) for page in pages for prompt, answer in page.questions
                 if prompts[prompt] == 1]
    kind = rng.random() if questions else rng.random() * (1 - ask)
    asks = []
    if kind >= read:
        asks = rng.sample(questions, min(most, len(questions)))
        if len(pages) == 1 and len(asks) < least:
            asks += places(rng, pages[0], least - len(asks))
    if kind < 1 - ask or not asks:
        asks.insert(rng.choice([0, len(asks)]), (READ, "\n\n".join(page.text for page in pages)))
    turns = []
    for i, (prompt, answer) in enumerate(asks):
        images = [IMAGE] * len(pages) if i == 0 else []
        turns += [Turn("user", images + [phrased(rng, prompt)]), Turn("assistant", [answer])]
    return turns


def misread(rng: random.Random, tokens: Tensor, labels: Tensor) -> Tensor:
    """Tokens (L,) of a chat, some of its answers' exchanged for others of them, as if the reader
    had erred there. The labels (L,) stay: so it learns to find its place again.

    Nougat (https://arxiv.org/abs/2308.13418) does so against endless repetitions.
    """
    numbers = np.random.default_rng(rng.getrandbits(32))
    inside = (labels[:-1] != IGNORE) & (labels[1:] != IGNORE)   # of an answer, but not its end
    places = 1 + inside.nonzero()[:, 0].numpy()
    wrong = places[numbers.random(len(places)) < numbers.choice([0, 0.03, 0.1])]
    tokens = tokens.clone()
    tokens[wrong] = tokens[numbers.permutation(places)[:len(wrong)]]
    return tokens


def phrased(rng: random.Random, prompt: str) -> str:
    """A question with or without capital and question mark."""
    if prompt != READ and rng.random() < 0.4:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt.rstrip("?") if prompt != READ and rng.random() < 0.1 else prompt


def lesson_page(rng: random.Random, split: str, config: SigLIPConfig,
                grids: list[tuple[int, int]], lines: int = 10 ** 6,
                kinds: tuple[str, ...] = TO_READ) -> Page:
    """A page of one of the kinds, which is cut into one of these grids of tiles."""
    kind = rng.choice(kinds)
    type_size = (20, 36) if rng.random() < 0.08 else (11, 20)       # as of a small crop, enlarged
    while True:
        page = write_page(rng, kind, split, config, grids, 1200, lines, type_size)
        if choose_grid(page.width, page.height, config.image_size) in grids:    # else write another
            return page


class LaidOut(Dataset):
    """Stage 0's steps: a packed row of tokens (1, L), labels (1, L), ids (P, n), weights (P, n),
    and the samples' lengths.

    P: the patches of all pages of the step, in the order of the IMAGE places in tokens, each of n
    tokens; where a page's patches have fewer, the others have no weight. A step has either pages of
    a single tile or of several, as many as make `budget` tokens. Many single tiles are shown
    without their blank rows of patches: the less there is to look through, the sooner copying
    begins, and the more text a step has. Tiles are those of `config` at first, then also those of
    `large`.
    """

    def __init__(self, seed: int, split: str, tokenizer: Tokenizer, config: SigLIPConfig,
                 large: SigLIPConfig, budget: int = 7000):
        self.seed, self.split, self.tokenizer = seed, split, tokenizer
        self.config, self.large = config, large
        self.budget, self.tokens = budget, class_tokens(tokenizer)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        rng = random.Random(f"{self.seed}/text/{self.split}/{step}")
        config = self.config if step < 2000 or rng.random() < 0.4 else self.large
        return self.row(rng, step, config, rng.random() < (1 if step < 1000 else 0.7))

    def row(self, rng: random.Random, step: int, config: SigLIPConfig,
            single: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """A step's pages, in tiles of this size, each of a single one or of several."""
        samples, size = [], 0
        while size < self.budget:
            samples.append(self.sample(rng, step, config, single))
            size += len(samples[-1][0])
        return packed(samples)

    def sample(self, rng: random.Random, step: int, config: SigLIPConfig, single: bool) -> tuple:
        """A page and turns about it: tokens (L,), labels (L,), ids (P, n), weights (P, n)."""
        lines = 1 + step // 60 if step < 700 else 10 ** 6           # longer by and by
        tiles = 2 + (step - 1000) // 150                            # more of them by and by
        most = 3 if config is self.large else max(2, min(9, tiles))
        # The more tiles, the rarer: nine cost as much as nine times one.
        grids = [(r, c) for r, c in GRIDS for _ in range(9 // (r * c)) if 1 < r * c <= most]
        page = lesson_page(rng, self.split, config, [(1, 1)] if single else grids, lines)
        doubt = 0.0 if rng.random() < 0.3 else rng.random()
        # An encoder is not sure to a pixel where a character is: it stands in two patches, partly.
        shifts = [(rng.gauss(0, doubt), rng.gauss(0, doubt)) for _ in range(4 if doubt else 1)]
        classes = np.stack([page.all_classes(config, shift) for shift in shifts])
        K = len(classes)                                                    # (K, T, N, SLOTS)
        dense = 0.85 if step < 1000 else 0.7 if config is self.large else 0.3
        if single and rng.random() < dense:
            side = config.patches_per_side
            rows = classes.reshape(K, side, side, SLOTS)
            classes = rows[:, (rows != BLANK).any((0, 2, 3))]               # (K, rows, side, SLOTS)
        classes = classes.reshape(K, -1, SLOTS)                             # (K, P, SLOTS)
        ids, weights = mixtures(rng, classes, self.tokens, 0.5 * doubt)
        asking = 0.1 if step < 3000 else 0.3                        # first it learns to read
        turns = turns_about(rng, [page], 1 - 2 * asking, asking)
        tokens, labels = encode_chat(turns, self.tokenizer, [len(ids)])     # (L,) both
        return misread(rng, tokens, labels), labels, ids, weights


def packed(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Samples one after another in a row, and their lengths."""
    tokens, labels, ids, weights = zip(*samples)
    n = max(i.shape[1] for i in ids)
    ids, weights = ([np.pad(x, ((0, 0), (0, n - x.shape[1]))) for x in xs] for xs in (ids, weights))
    return (torch.cat(tokens)[None], torch.cat(labels)[None],
            torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(weights)),
            [len(t) for t in tokens])


# How often a stage has pages of each grid of tiles, (rows, columns). A page of two costs three
# times as much as one of a single tile: on two cores there was no time for more of them.
ONE_TILE = {(1, 1): 1.0}
UP_TO_FOUR = {(1, 1): 0.97, (1, 2): 0.008, (2, 1): 0.008, (1, 3): 0.005, (3, 1): 0.005,
              (2, 2): 0.004}


class ReaderDocuments(Dataset):
    """The samples of a stage of the paper: sample i depends on (seed, split, stage, i, n).

    1: one tile read aloud. 2: pages of one tile and of several, and questions. 3: more of these.
    """

    def __init__(self, stage: int, n: int, seed: int, tokenizer: Tokenizer, config: SigLIPConfig,
                 split: str = "train", tile_tokens: int | None = None):
        self.stage, self.n, self.seed, self.split = stage, n, seed, split
        self.tokenizer, self.config, self.tile_tokens = tokenizer, config, tile_tokens

    def draws(self, start: Position) -> Iterator[tuple[int | None, Position]]:
        return numbered_draws(self.n, start)

    def __getitem__(self, index: "int | Position") -> "Sample | Position":
        if isinstance(index, Position):
            return index
        rng = random.Random(f"{self.seed}/{self.split}/{self.stage}/{index}")
        shares = ONE_TILE if self.stage == 1 else UP_TO_FOUR
        grids = [(r, c) for r, c in shares if r * c <= self.config.max_tiles]
        grid = rng.choices(grids, [shares[grid] for grid in grids])[0]
        read, ask = {1: (1.0, 0.0), 2: (0.35, 0.4), 3: (0.25, 0.6)}[self.stage]
        kinds = TO_ASK if self.stage > 1 and rng.random() < 0.7 else TO_READ
        pages = [lesson_page(rng, self.split, self.config, [grid], kinds=kinds)]
        if self.stage == 3 and rng.random() < 0.06:         # two images, as the pages of a PDF
            pages.append(lesson_page(rng, self.split, self.config, [(1, 1)], kinds=TO_ASK))
        turns = turns_about(rng, pages, read, ask, 12, 6)
        example = Example([page.draw() for page in pages], turns, f"reader/{self.stage}/{index}")
        sample = prepare(example, self.tokenizer, self.config, self.config.max_tiles,
                         tile_tokens=self.tile_tokens)
        return replace(sample, tokens=misread(rng, sample.tokens, sample.labels))
