"""What the vocabulary says: the words of the LLM that the Align connector maps a page's patches to (section 5.3).

    python sample.py --image doc.png --explain words.png    # every patch's word, written over the page: `explain`
    python eval.py --vocab 100                              # P_vocab over many pages, as in Figure 3: `vocab_report`
"""
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from connector import AlignTopK, blocks, spread
from data import Tokenizer
from model import AlignVLM
from plumbing.settings import InputError
from vision import SigLIPConfig, on_canvas, tile, tile_boxes

CELL = 52                       # the side of a patch in the picture, in pixels: a word of some ten letters fits in
MAX_PIXELS = 60_000_000         # of a picture; larger pages are drawn with smaller patches
INK = {"letters": (28, 78, 186), "digits": (196, 84, 8), "punctuation": (0, 118, 92), "white space": (104, 108, 122),
       "bytes and special tokens": (140, 48, 150)}
SPACES = {" ": "space", "\n": "line end", "\t": "tab", "\r": "return"}


# ---------------------------------------------------------------------------------------------------------------------
# Patches and words


@torch.inference_mode()
def distributions(model: AlignVLM, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tiles (T, 3, S, S) -> a block of their T * N patches and its P_vocab (n, V), equation 1; one block at a time.

    Of a connector that mixes only K words the others have probability 0. Raises InputError for one that mixes none.
    """
    connector, E_text = model.connector, model.llm.embed_tokens.weight
    if not hasattr(connector, "p_vocab"):
        raise InputError(f"{type(connector).__name__} maps patches to no words: only the Align connector does")
    F = model.vision(pixels.to(E_text)).flatten(0, 1)                           # (T * N, d)
    for block in blocks(len(F), 12 * len(E_text)):
        P = connector.p_vocab(F[block])                                         # (n, V)
        if isinstance(connector, AlignTopK):
            P = P.new_zeros(len(P), len(E_text)).index_copy(1, connector.words, P)
        yield block, P


def words_of(model: AlignVLM, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles (T, 3, S, S) -> of every patch the word with the highest probability, ids (T, N), and that probability."""
    best = [P.max(-1) for _, P in distributions(model, pixels)]
    ids, p = (torch.cat([getattr(block, what) for block in best]) for what in ("indices", "values"))     # (T * N,)
    return ids.view(len(pixels), -1).cpu(), p.view(len(pixels), -1).float().cpu()


def patch_boxes(box: tuple[int, int, int, int], config: SigLIPConfig) -> np.ndarray:
    """What each patch of a tile shows: (N, 4), its left, top, right, bottom in page pixels (fractions of them).

    `tile` the other way round. What a patch shows of the canvas beside the page is cut off, so a patch that shows
    nothing else is empty: its right is its left, or its bottom its top.
    """
    left, top, right, bottom = box
    x, y, width, height = on_canvas(right - left, bottom - top, config.image_size)
    edges = np.arange(config.patches_per_side + 1) * config.patch_size          # in canvas pixels
    xs = left + (edges - x).clip(0, width) / width * (right - left)
    ys = top + (edges - y).clip(0, height) / height * (bottom - top)
    row, column = np.indices((config.patches_per_side,) * 2).reshape(2, -1)
    return np.stack([xs[column], ys[row], xs[column + 1], ys[row + 1]], axis=1)


def legible(tokenizer: Tokenizer, i: int) -> tuple[str, str]:
    """A word as it can be shown, and its kind, one of INK: white space by its name, bytes in hexadecimal digits.

    A space before a word is a raised dot. Pillow's built-in font has few letters: accents are left out, and a letter
    that it lacks is shown as its code point.
    """
    try:
        word = tokenizer.pairs.token_bytes(i)
    except KeyError:            # an id that the vocabulary leaves out
        return f"#{i}", "bytes and special tokens"
    if i in tokenizer.special.values():
        return word.decode().strip("<|>").replace("_", " "), "bytes and special tokens"
    try:
        text = word.decode()
    except UnicodeDecodeError:
        return f"0x{word.hex().upper()}", "bytes and special tokens"
    if text.isspace():
        runs = Counter(SPACES.get(c, f"U+{ord(c):04X}") for c in text)
        return ", ".join(f"{n} {name}s" if n > 1 else name for name, n in runs.items()), "white space"
    kind = "letters" if any(map(str.isalpha, text)) else "digits" if any(map(str.isdigit, text)) else "punctuation"
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    shown = "".join(c if has_glyph(c) else SPACES.get(c, f"U+{ord(c):04X}") for c in plain.strip(" "))
    return "·" * text.startswith(" ") + (shown or " ".join(f"U+{ord(c):04X}" for c in text)), kind


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@cache
def has_glyph(character: str) -> bool:
    """Whether the built-in font can draw a character: what it has no glyph for all looks the same."""
    drawn, missing = (font(16).getmask(c) for c in (character, "\U0010ffff"))
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


# ---------------------------------------------------------------------------------------------------------------------
# A page explained


def explain(model: AlignVLM, tokenizer: Tokenizer, page: Image.Image, out: Path, max_tiles: int = 9,
            title: str = "") -> None:
    """Write to `out` the page with, over every patch, the word that it was mapped to, the more opaque the likelier.

    Of several tiles the whole page, which the LLM reads first, stands on the left, the others in place beside it.
    Raises InputError if the connector mixes no words, or for an `out` that is no PNG.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG: call it so")
    config = model.config.vision
    ids, p = words_of(model, tile(page, config, max_tiles))                     # (T, N)
    boxes = tile_boxes(*page.size, config, max_tiles)
    words = {i: legible(tokenizer, i) for i in ids.unique().tolist()}
    one = [("the page, in one tile", slice(0, 1))]
    several = [("the whole page, in one tile", slice(0, 1)), (f"its {len(boxes) - 1} tiles", slice(1, None))]
    full = p.quantile(0.9).item()       # of the likeliest: one sure patch should not make all the others pale
    panels = [(name, panel(page, boxes[part], ids[part], (p[part] / full).clamp(max=1), words, config))
              for name, part in (one if len(boxes) == 1 else several)]
    count = Counter(words[i][1] for i in ids.flatten().tolist())
    shares = {kind: count[kind] / ids.numel() for kind in INK}
    picture = sheet(panels, title, shares, full)
    partial = out.with_name(out.name + ".partial")
    picture.save(partial, "PNG")
    os.replace(partial, out)


def panel(page: Image.Image, boxes: list[tuple[int, int, int, int]], ids: Tensor, opacity: Tensor,
          words: dict[int, tuple[str, str]], config: SigLIPConfig) -> Image.Image:
    """The pale page with a word over every patch of the tiles that lie at `boxes`; ids and opacity (T, N)."""
    patches = np.concatenate([patch_boxes(box, config) for box in boxes])       # (T * N, 4)
    largest = (patches[:, 2:] - patches[:, :2]).max()
    scale = min(CELL / largest, (MAX_PIXELS / (page.width * page.height)) ** 0.5)
    size = [max(1, round(side * scale)) for side in page.size]
    pale = Image.blend(page.resize(size, Image.Resampling.BICUBIC), Image.new("RGB", size, "white"), 0.75)
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    for box, i, alpha in zip((patches * scale).round().astype(int).tolist(), ids.flatten().tolist(),
                             opacity.flatten().tolist()):
        write(draw, box, *words[i], alpha)
    for box in boxes if len(boxes) > 1 else []:
        draw.rectangle([round(edge * scale) for edge in box], outline=(0, 0, 0, 70))
    return Image.alpha_composite(pale.convert("RGBA"), layer).convert("RGB")


def write(draw: ImageDraw.ImageDraw, box: list[int], word: str, kind: str, opacity: float) -> None:
    """A word on a tinted tag that fills the box but for a margin."""
    left, top, right, bottom = box
    if right - left < 4 or bottom - top < 4:
        return
    ink = INK[kind]
    draw.rounded_rectangle([left + 1, top + 1, right - 2, bottom - 2], radius=4, fill=(*ink, round(45 * opacity)))
    if right - left < CELL // 3 or bottom - top < CELL // 3:
        return
    largest = 11 if kind == "white space" else 26           # most of a page is blank: that should not be read first
    size, lines = fit(word, right - left - 6, bottom - top - 4, largest)
    draw.multiline_text(((left + right) / 2, (top + bottom) / 2), lines, font=font(size), anchor="mm", align="center",
                        spacing=1, fill=(*ink, round(255 * opacity)), stroke_width=2,
                        stroke_fill=(255, 255, 255, round(200 * opacity)))


RULER = ImageDraw.Draw(Image.new("L", (1, 1)))         # measures text


@cache
def fit(word: str, width: int, height: int, largest: int) -> tuple[int, str]:
    """The font size and the lines with which a word is largest in a box of width x height pixels; its end may go."""
    for n_lines, most, least in (1, min(largest, height * 6 // 10), 11), (2, 13, 10), (3, 10, 8):
        step = -(-len(word) // n_lines)
        lines = "\n".join(word[i:i + step] for i in range(0, len(word), step))
        if n_lines == 1 + word.count(" "):
            lines = word.replace(" ", "\n")
        for size in range(max(most, least), least - 1, -1):
            left, top, right, bottom = RULER.multiline_textbbox((0, 0), lines, font=font(size), spacing=1)
            if right - left <= width and bottom - top <= height:
                return size, lines
    shorter = word.removesuffix("…")[:-1 - len(word) // 8] + "…"
    return (8, word) if len(word) < 3 else fit(shorter, width, height, largest)


def sheet(panels: list[tuple[str, Image.Image]], title: str, shares: dict[str, float], full: float) -> Image.Image:
    """Title, panels side by side, each under its caption, and the legend: the kinds of words with their shares, and
    what full opacity stands for."""
    gap = 28
    width = max(sum(panel.width + gap for _, panel in panels) - gap, 620)
    text = min(max(width // 75, 15), 40)
    image = Image.new("RGB", (width + 2 * gap, max(panel.height for _, panel in panels) + 12 * text + 3 * gap), "white")
    draw = ImageDraw.Draw(image)
    draw.text((gap, gap), title, font=font(text * 5 // 4), fill=(30, 32, 40))
    x, y = gap, gap + 2 * text
    for name, panel in panels:
        draw.text((x, y), name, font=font(text), fill=(104, 108, 122))
        image.paste(panel, (x, y + 2 * text))
        draw.rectangle([x - 1, y + 2 * text - 1, x + panel.width, y + 2 * text + panel.height], outline=(214, 216, 222))
        x += panel.width + gap
    x, y = gap, y + 2 * text + max(panel.height for _, panel in panels) + gap
    for kind, share in shares.items():
        if share == 0:
            continue
        entry = f"{kind} {share:.0%}" if share >= 0.01 else f"{kind} {share:.1%}"
        if x + 2 * text + draw.textlength(entry, font(text)) > width + gap:
            x, y = gap, y + 2 * text
        draw.rounded_rectangle([x, y, x + text, y + text], radius=text // 4, fill=INK[kind])
        draw.text((x + 1.5 * text, y + text / 2), entry, font=font(text), fill=(30, 32, 40), anchor="lm")
        x += round(3.5 * text + draw.textlength(entry, font(text)))
    x, y = gap, y + 2 * text
    for i in range(8 * text):
        fade = tuple(round(255 + (ink - 255) * i / (8 * text)) for ink in INK["letters"])
        draw.line([x + i, y, x + i, y + text], fill=fade)
    draw.text((x + 8.5 * text, y + text / 2), f"each patch's likeliest word; opacity: its probability, 0 to "
              f"{full:.2g} or more", font=font(text), fill=(30, 32, 40), anchor="lm")
    return image.crop((0, 0, image.width, y + text + gap))


# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary over many pages


@torch.inference_mode()
def vocab_report(model: AlignVLM, tokenizer: Tokenizer, pages: Iterable[Tensor], out: Path) -> dict:
    """P_vocab averaged over the patches of some pages, tiles (T, 3, S, S) of each: `out` is a PNG, a JSON lies beside.

    What the JSON says is returned: the highest probability of a word, how many words hold 90 % and 99 %, the likeliest
    words, those of blank patches (whose pixels are all one colour: the canvas beside a page counts), and what share of
    the variance of all word embeddings lies along the principal components of those that hold 99 %. Raises InputError.
    """
    figure = new_figure()
    E_text, config = model.llm.embed_tokens.weight, model.config.vision
    V = len(E_text)
    total, blank_total = (torch.zeros(V, dtype=torch.float64, device="cpu") for _ in range(2))      # (V,)
    n_pages = n_patches = n_blank = 0
    taken = Counter()               # by blank patches: word -> how many
    for pixels in tqdm(pages, desc="P_vocab"):
        blank = blank_patches(pixels, config)                                   # (T * N,)
        for block, P in distributions(model, pixels):                           # (n, V)
            here = P[blank[block].to(P.device)]                                 # (blank ones, V)
            total += P.sum(0, dtype=torch.float32).cpu()
            blank_total += here.sum(0, dtype=torch.float32).cpu()
            taken.update(here.argmax(-1).tolist())
        n_pages, n_patches, n_blank = n_pages + 1, n_patches + len(blank), n_blank + int(blank.sum())
    if n_pages == 0:
        raise InputError("--vocab: no pages to read")
    mean = total / n_patches                                                    # (V,)
    p, order = mean.sort(descending=True)                                       # (V,)
    holding = {share: int((p.cumsum(0) < share).sum()) + 1 for share in (0.9, 0.99)}
    kept = order[:holding[0.99]]
    points, own, best = principal_components(E_text, kept.to(E_text.device))

    def row(i: int, probability: float, **more) -> dict:
        return {"id": i, "word": legible(tokenizer, i)[0], "probability": probability, **more}

    report = {"pages": n_pages, "patches": n_patches, "blank_patches": n_blank, "words": V,
              "highest_probability": p[0].item(), "words_for_90": holding[0.9], "words_for_99": holding[0.99],
              "likeliest": [row(i, mean[i].item()) for i in order[:20].tolist()],
              "blank": [row(i, blank_total[i].item() / n_blank, patches=n / n_blank)
                        for i, n in taken.most_common(20)],
              "components": COMPONENTS, "variance_along_theirs": own, "variance_along_its_own": best}
    draw_report(figure, report, p.numpy(), np.isin(order.numpy(), list(taken)), points.numpy(), kept.numpy())
    partial = out.with_name(out.name + ".partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, out)
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, out.with_suffix(".json"))
    return report


def blank_patches(pixels: Tensor, config: SigLIPConfig) -> Tensor:
    """Tiles (T, 3, S, S) -> which of the T * N patches are of one colour, bool (T * N,)."""
    patch, side = config.patch_size, config.patches_per_side * config.patch_size
    patches = pixels[..., :side, :side].unfold(2, patch, patch).unfold(3, patch, patch)     # (T, 3, rows, columns, ...)
    return (patches.amax((-2, -1)) == patches.amin((-2, -1))).all(1).flatten()


COMPONENTS = 10


def principal_components(E_text: Tensor, kept: Tensor) -> tuple[Tensor, float, float]:
    """All words' embeddings E_text (V, D) and some words' ids (K,) -> points (V, 2), the first two components of all.

    Then the share of the variance of all embeddings that lies along the first COMPONENTS of the K words' own principal
    components, and the most that so many could hold, along those of all.
    """
    mean, C = spread(E_text)                                                    # (D,), (D, D)
    values, axes = torch.linalg.eigh(C)                                         # ascending; a column is an axis
    _, theirs = torch.linalg.eigh(spread(E_text[kept])[1])                      # (D, D)
    theirs = theirs[:, -COMPONENTS:]                                            # (D, COMPONENTS)
    points = torch.cat([(rows - mean) @ axes[:, -2:].flip(1) for rows in E_text.split(4096)])       # (V, 2)
    along = (theirs * (C @ theirs)).sum()
    return points.float().cpu(), (along / C.trace()).item(), (values[-COMPONENTS:].sum() / C.trace()).item()


def new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--vocab needs `pip install matplotlib`") from None
    return Figure(figsize=(13, 9), layout="constrained")


def draw_report(figure, report: dict, p: np.ndarray, blank: np.ndarray, points: np.ndarray, kept: np.ndarray) -> None:
    """p (V,) in falling order, and which of these words blank patches take; points (V, 2) of all words, kept ids."""
    ink = {kind: "#%02x%02x%02x" % INK[kind] for kind in INK}
    (curve, bars), (share, scatter) = figure.subplots(2, 2)
    rank = np.arange(1, len(p) + 1)
    curve.fill_between(rank, p, p.min() / 2, color=ink["letters"], alpha=0.12, linewidth=0)
    curve.plot(rank, p, color=ink["letters"], linewidth=1, label="every word")
    curve.plot(rank[blank], p[blank], "o", color=ink["digits"], markersize=4, label="likeliest of some blank patch")
    curve.set(xscale="log", yscale="log", xlabel="words, the likeliest first", ylabel="mean probability",
              title=f"P_vocab over {report['patches']:,} patches of {report['pages']:,} pages: at most "
                    f"{report['highest_probability']:.3g}")
    curve.legend(frameon=False)
    share.plot(rank, p.cumsum(), color=ink["letters"])
    for part, n in (0.9, report["words_for_90"]), (0.99, report["words_for_99"]):
        share.plot([1, n, n], [part, part, 0], color=ink["white space"], linewidth=0.8, linestyle="--")
        share.annotate(f"{part:.0%}: {n:,} words", (1, part), (0, -13), textcoords="offset points")
    share.set(xscale="log", xlabel="words, the likeliest first", ylabel="of the probability", ylim=(0, 1.04),
              title=f"what the first of {report['words']:,} words hold")
    rows = report["likeliest"][::-1]
    taken = {row["id"] for row in report["blank"]}
    bars.barh(range(len(rows)), [row["probability"] for row in rows],
              color=[ink["digits"] if row["id"] in taken else ink["letters"] for row in rows])
    bars.set_yticks(range(len(rows)), [row["word"].replace("$", r"\$") for row in rows])
    bars.set(xlabel="mean probability", title="the likeliest words (orange: of blank patches)")
    scatter.plot(*points.T, "o", color="#c9ccd4", markersize=2, label="all words")
    scatter.plot(*points[kept].T, "o", color=ink["letters"], markersize=3, label="those that hold 99 %")
    scatter.plot(*points[kept[:report["words_for_90"]]].T, "o", color=ink["digits"], markersize=3,
                 label="those that hold 90 %")
    scatter.set(xlabel="first principal component of E_text", ylabel="second",
                title=f"{report['components']} axes of the 99 %: {report['variance_along_theirs']:.0%} of all variance "
                      f"(at best {report['variance_along_its_own']:.0%})")
    scatter.legend(frameon=False)


def summary_line(words: dict, out: Path) -> str:
    """What --vocab found, in a sentence."""
    likeliest, blank = words["likeliest"][0], words["blank"][0] if words["blank"] else {"word": "-", "patches": 0.0}
    return (f"{words['words_for_90']:,} of {words['words']:,} words hold 90 % of the probability, "
            f"{words['words_for_99']:,} hold 99 %; the likeliest, {likeliest['word']}, has "
            f"{likeliest['probability']:.3f}; "
            f"{blank['patches']:.1%} of the blank patches become {blank['word']}: {out}/vocab.png and vocab.json")
