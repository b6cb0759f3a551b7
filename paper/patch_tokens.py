"""The tokens that the Align connector maps a page's patches to (section 5.3).

    python sample.py --image doc.png --explain tokens.png   # every patch's token, over the page
    python eval.py --vocab 100                              # P_vocab over many pages (Figure 3)
"""
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from connector import AlignTopK, spread, token_blocks
from data import Tokenizer
from model import AlignVLM
from plumbing.files import numbered, replacing, write_text
from plumbing.images import read_pages
from plumbing.settings import InputError, read_json
from vision import SigLIPConfig, on_canvas, tile, tile_boxes

CELL = 52                       # the side of a patch in the picture, in pixels: ten letters fit in
MAX_PIXELS = 60_000_000         # of a picture; larger pages are drawn with smaller patches
INK = {"letters": (28, 78, 186), "digits": (196, 84, 8), "punctuation": (0, 118, 92),
       "white space": (104, 108, 122), "bytes and special tokens": (140, 48, 150)}
TITLE, CAPTION, FRAME = (30, 32, 40), (104, 108, 122), (214, 216, 222)      # colours of the sheet
SPACES = {" ": "space", "\n": "line end", "\t": "tab", "\r": "return"}

# -------------------------------------------------------------------------------------------------
# Patches and tokens


@torch.inference_mode()
def distributions(model: AlignVLM, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tiles (T, 3, S, S) -> blocks of n of their T * N patches, each with its P_vocab (n, V).

    Raises InputError for a connector that mixes no tokens.
    """
    if not hasattr(model.connector, "p_vocab"):
        raise InputError(f"{type(model.connector).__name__} maps patches to no tokens: only the "
                         "Align connector does")
    F = model.vision(pixels.to(model.llm.embed_tokens.weight.device))           # (T, N, d)
    yield from distributions_of(model, F.flatten(0, 1))


@torch.inference_mode()
def distributions_of(model: AlignVLM, F: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Features F (n_patches, d) -> blocks of n of them, each with its P_vocab (n, V), equation 1.

    Of a connector that mixes only k tokens the others have probability 0.
    """
    connector = model.connector
    E_text = model.llm.embed_tokens.weight                                      # (V, D)
    # A patch has three rows in fp32: the logits, their norm, and P.
    for block in token_blocks(len(F), 12 * len(E_text)):
        P = connector.p_vocab(F[block])                                         # (n, V)
        if isinstance(connector, AlignTopK):
            P = P.new_zeros(len(P), len(E_text)).index_copy(1, connector.token_ids, P)
        yield block, P


def likeliest_tokens(model: AlignVLM, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles (T, 3, S, S) -> the likeliest token of every patch, ids (T, N), and its probability."""
    ids, probabilities = [], []
    for _, P in distributions(model, pixels):
        p, best = P.max(-1)                                                     # (n,)
        ids.append(best.cpu())
        probabilities.append(p.float().cpu())
    T = len(pixels)
    return torch.cat(ids).view(T, -1), torch.cat(probabilities).view(T, -1)


def patch_boxes(box: tuple[int, int, int, int], config: SigLIPConfig) -> np.ndarray:
    """What each patch of a tile shows: (N, 4), its left, top, right, bottom in page pixels.

    `tile` the other way round, so the numbers are fractions. What a patch shows of the canvas
    beside the page is cut off. A patch that shows nothing else is empty: its right is its left, or
    its bottom its top.
    """
    left, top, right, bottom = box
    x, y, width, height = on_canvas(right - left, bottom - top, config.image_size)
    edges = np.arange(config.patches_per_side + 1) * config.patch_size          # in canvas pixels
    xs = left + (edges - x).clip(0, width) / width * (right - left)
    ys = top + (edges - y).clip(0, height) / height * (bottom - top)
    row, column = np.indices((config.patches_per_side,) * 2).reshape(2, -1)
    return np.stack([xs[column], ys[row], xs[column + 1], ys[row + 1]], axis=1)


def named(tokenizer: Tokenizer, i: int) -> tuple[str, str]:
    """A token as a text that can be shown, and its kind, one of INK.

    White space is shown by its name, bytes in hexadecimal digits, a space before a word as a raised
    dot, what has no glyph (control characters, marks of direction) as its code point.
    """
    token = tokenizer.pairs.token_bytes(i)
    if not token:               # an id that the vocabulary leaves out
        return f"#{i}", "bytes and special tokens"
    if i in tokenizer.special.values():
        return token.decode().strip("<|>").replace("_", " "), "bytes and special tokens"
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return f"0x{token.hex().upper()}", "bytes and special tokens"
    if text.isspace():
        return named_spaces(text), "white space"

    kind = "punctuation"
    if any(map(str.isalpha, text)):
        kind = "letters"
    elif any(map(str.isdigit, text)):
        kind = "digits"
    shown = "".join(c if c.isprintable() else SPACES.get(c, code_point(c)) for c in text.strip(" "))
    return "·" * text.startswith(" ") + shown, kind


def legible(tokenizer: Tokenizer, i: int) -> tuple[str, str]:
    """The same with the few letters that Pillow's built-in font has.

    Accents are left out, and a letter that it lacks is shown as its code point.
    """
    text, kind = named(tokenizer, i)
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    shown = "".join(c if has_glyph(c) else code_point(c) for c in plain)
    return shown or " ".join(map(code_point, text)), kind


def named_spaces(text: str) -> str:
    """White space in words: "3 spaces", "2 line ends, tab"."""
    counts = Counter(SPACES.get(c, code_point(c)) for c in text)
    return ", ".join(f"{n} {name}s" if n > 1 else name for name, n in counts.items())


def code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@cache
def has_glyph(character: str) -> bool:
    """Whether the built-in font can draw a character: all that it cannot draw looks the same."""
    drawn = font(16).getmask(character)
    missing = font(16).getmask("\U0010ffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


# -------------------------------------------------------------------------------------------------
# A page explained


def explain_files(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], out: Path,
                  max_tiles: int | None, chosen: str | None = None) -> None:
    """A picture of each page's tokens: `out`, or of several pages one each, numbered. chosen: of
    each file, as read_pages takes it. Raises InputError if a picture would be written over a
    file."""
    pages = [(file, page) for file in files for page in read_pages(file, chosen)]
    paths = numbered(out, len(pages), files)
    for (file, page), path in zip(tqdm(pages, desc="explaining"), paths):
        draw_tokens(model, tokenizer, page, path, max_tiles, file.name)
        tqdm.write(f"{file}: the token of every patch is drawn in {path}")


def draw_tokens(model: AlignVLM, tokenizer: Tokenizer, page: Image.Image, out: Path,
                max_tiles: int | None = None, title: str = "") -> None:
    """Write to `out` the page with its likeliest token over every patch.

    The likelier a token, the more opaque it is. Of several tiles the whole page, which the LLM
    reads first, stands on the left, the others in place beside it. Raises InputError if the
    connector mixes no tokens, or for an `out` that is no PNG.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG: call it so")
    config = model.config.vision
    ids, p = likeliest_tokens(model, tile(page, config, max_tiles))             # (T, N)
    boxes = tile_boxes(*page.size, config, max_tiles)
    tokens = {i: legible(tokenizer, i) for i in ids.unique().tolist()}
    full = p.quantile(0.9).item()       # one sure patch should not make all the others pale
    opacity = (p / full).clamp(max=1)                                           # (T, N)

    captions = {"the page, in one tile": slice(0, 1)}
    if len(boxes) > 1:
        captions = {"the whole page, in one tile": slice(0, 1),
                    f"its {len(boxes) - 1} tiles": slice(1, None)}
    panels = [(caption, panel(page, boxes[tiles], ids[tiles], opacity[tiles], tokens, config))
              for caption, tiles in captions.items()]

    count = Counter(tokens[i][1] for i in ids.flatten().tolist())
    shares = {kind: count[kind] / ids.numel() for kind in INK}
    picture = sheet(panels, title, shares, full)
    mark = PngInfo()
    mark.add_text("Software", "AlignVLM")       # by which is_ours knows it
    with replacing(out) as partial:
        picture.save(partial, "PNG", pnginfo=mark)


def panel(page: Image.Image, boxes: list[tuple[int, int, int, int]], ids: Tensor, opacity: Tensor,
          tokens: dict[int, tuple[str, str]], config: SigLIPConfig) -> Image.Image:
    """The pale page with a token over every patch of the tiles that lie at `boxes`.

    ids and opacity are (T, N); tokens: of each id what `legible` says.
    """
    patches = np.concatenate([patch_boxes(box, config) for box in boxes])       # (T * N, 4)
    largest = (patches[:, 2:] - patches[:, :2]).max()
    scale = min(CELL / largest, (MAX_PIXELS / (page.width * page.height)) ** 0.5)
    size = [max(1, round(side * scale)) for side in page.size]
    white = Image.new("RGB", size, "white")
    pale = Image.blend(page.resize(size, Image.Resampling.BICUBIC), white, 0.75)

    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    places = (patches * scale).round().astype(int).tolist()
    for box, i, alpha in zip(places, ids.flatten().tolist(), opacity.flatten().tolist()):
        text, kind = tokens[i]
        write(draw, box, text, kind, alpha)
    if len(boxes) > 1:
        for box in boxes:
            draw.rectangle([round(edge * scale) for edge in box], outline=(0, 0, 0, 70))
    return Image.alpha_composite(pale.convert("RGBA"), layer).convert("RGB")


def write(draw: ImageDraw.ImageDraw, box: list[int], text: str, kind: str, opacity: float) -> None:
    """A token on a tinted tag that fills the box but for a margin."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if min(width, height) < 4:
        return
    ink = INK[kind]
    tag = [left + 1, top + 1, right - 2, bottom - 2]
    draw.rounded_rectangle(tag, radius=4, fill=(*ink, round(45 * opacity)))
    if min(width, height) < CELL // 3:
        return
    largest = 11 if kind == "white space" else 26       # blank patches should not be read first
    size, lines = fit(text, width - 6, height - 4, largest)
    draw.multiline_text(((left + right) / 2, (top + bottom) / 2), lines, font=font(size),
                        anchor="mm", align="center", spacing=1, stroke_width=2,
                        fill=(*ink, round(255 * opacity)),
                        stroke_fill=(255, 255, 255, round(200 * opacity)))


RULER = ImageDraw.Draw(Image.new("L", (1, 1)))         # measures text


@cache
def fit(text: str, width: int, height: int, largest: int) -> tuple[int, str]:
    """The font size and the lines with which a text is largest in a box of width x height pixels.

    What fits in no way loses its end.
    """
    one_line = (1, min(largest, height * 6 // 10), 11)      # how many lines, largest size, smallest
    for n_lines, most, least in one_line, (2, 13, 10), (3, 10, 8):
        step = -(-len(text) // n_lines)
        lines = "\n".join(text[i:i + step] for i in range(0, len(text), step))
        if n_lines == 1 + text.count(" "):
            lines = text.replace(" ", "\n")
        for size in range(max(most, least), least - 1, -1):
            left, top, right, bottom = RULER.multiline_textbbox((0, 0), lines, font=font(size),
                                                                spacing=1)
            if right - left <= width and bottom - top <= height:
                return size, lines
    if len(text) < 3:
        return 8, text
    shorter = text.removesuffix("…")[:-1 - len(text) // 8] + "…"
    return fit(shorter, width, height, largest)


GAP = 28        # between the parts of the sheet, in pixels


def sheet(panels: list[tuple[str, Image.Image]], title: str, shares: dict[str, float],
          full: float) -> Image.Image:
    """Title, panels side by side, each under its caption, and the legend.

    The legend has the kinds of tokens with their shares, and what full opacity stands for.
    """
    width = max(sum(panel.width + GAP for _, panel in panels) - GAP, 620)
    height = max(panel.height for _, panel in panels)
    text = min(max(width // 75, 15), 40)        # the size of what is written
    image = Image.new("RGB", (width + 2 * GAP, height + 12 * text + 3 * GAP), "white")
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, font=font(text * 5 // 4), fill=TITLE)
    x, y = GAP, GAP + 2 * text
    for name, panel in panels:
        draw.text((x, y), name, font=font(text), fill=CAPTION)
        top = y + 2 * text
        image.paste(panel, (x, top))
        draw.rectangle([x - 1, top - 1, x + panel.width, top + panel.height], outline=FRAME)
        x += panel.width + GAP
    y = legend(draw, width, y + 2 * text + height + GAP, text, shares)
    y = opacity_scale(draw, y + 2 * text, text, full)
    return image.crop((0, 0, image.width, y + GAP))


def legend(draw: ImageDraw.ImageDraw, width: int, y: int, text: int,
           shares: dict[str, float]) -> int:
    """The kinds of tokens, from y on. Returns where their last line begins."""
    x = GAP
    for kind, share in shares.items():
        if share == 0:
            continue
        entry = f"{kind} {share:.0%}" if share >= 0.01 else f"{kind} {share:.1%}"
        length = draw.textlength(entry, font(text))
        if x + 2 * text + length > width + GAP:
            x = GAP
            y += 2 * text
        draw.rounded_rectangle([x, y, x + text, y + text], radius=text // 4, fill=INK[kind])
        draw.text((x + 1.5 * text, y + text / 2), entry, font=font(text), fill=TITLE, anchor="lm")
        x += round(3.5 * text + length)
    return y


def opacity_scale(draw: ImageDraw.ImageDraw, y: int, text: int, full: float) -> int:
    """What the opacity of a token says, a line at y. Returns where it ends."""
    length = 8 * text
    for i in range(length):
        fade = tuple(round(255 + (ink - 255) * i / length) for ink in INK["letters"])
        draw.line([GAP + i, y, GAP + i, y + text], fill=fade)
    says = f"each patch's likeliest token; opacity: its probability, 0 to {full:.2g} or more"
    draw.text((GAP + 8.5 * text, y + text / 2), says, font=font(text), fill=TITLE, anchor="lm")
    return y + text


# -------------------------------------------------------------------------------------------------
# The vocabulary over many pages

COMPONENTS = 10


@torch.inference_mode()
def vocab_report(model: AlignVLM, tokenizer: Tokenizer, pages: Iterable[Tensor],
                 out: Path) -> dict:
    """P_vocab averaged over the patches of some pages, tiles (T, 3, S, S) of each.

    `out` is a PNG; a JSON lies beside it, and what it says is returned: the highest probability of
    a token, how many tokens hold 90 % and 99 %, the likeliest tokens, those of blank patches (whose
    pixels are all one colour: the canvas beside a page counts), and what share of the variance of
    all token embeddings lies along the principal components of those that hold 99 %.
    Raises InputError.
    """
    figure = new_figure()
    E_text = model.llm.embed_tokens.weight                                      # (V, D)
    total, blank_total, counts, taken = averaged_p_vocab(model, pages)
    n_patches, n_blank = counts["patches"], counts["blank_patches"]
    mean = total / n_patches                                                    # (V,)
    p, order = mean.sort(descending=True)                                       # (V,)
    tokens_for_90 = int((p.cumsum(0) < 0.9).sum()) + 1
    tokens_for_99 = int((p.cumsum(0) < 0.99).sum()) + 1
    kept = order[:tokens_for_99]
    points, along_theirs, along_its_own = principal_components(E_text, kept.to(E_text.device))

    def row(i: int, probability: float, **more) -> dict:
        text, _ = legible(tokenizer, i)
        return {"id": i, "token": text, "probability": probability, **more}

    report = {
        **counts, "tokens": len(E_text), "highest_probability": p[0].item(),
        "tokens_for_90": tokens_for_90, "tokens_for_99": tokens_for_99,
        "likeliest": [row(i, mean[i].item()) for i in order[:20].tolist()],
        "blank": [row(i, blank_total[i].item() / n_blank, patches=n / n_blank)
                  for i, n in taken.most_common(20)],
        "components": COMPONENTS, "variance_along_theirs": along_theirs,
        "variance_along_its_own": along_its_own}
    of_blank = np.isin(order.numpy(), list(taken))
    draw_report(figure, report, p.numpy(), of_blank, points.numpy(), kept.numpy())
    write_text(out.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return report


def averaged_p_vocab(model: AlignVLM, pages: Iterable[Tensor]
                     ) -> tuple[Tensor, Tensor, dict[str, int], Counter]:
    """P_vocab summed over all patches (V,), and over the blank ones (V,), both fp64 on the CPU.

    Then the counts of pages, patches and blank patches, and how many blank patches each token is
    the likeliest of. Raises InputError if there are no pages.
    """
    V = len(model.llm.embed_tokens.weight)
    total = torch.zeros(V, dtype=torch.float64)
    blank_total = torch.zeros(V, dtype=torch.float64)
    counts = {"pages": 0, "patches": 0, "blank_patches": 0}
    taken = Counter()
    for pixels in tqdm(pages, desc="P_vocab"):
        blank = blank_patches(pixels, model.config.vision)                      # (T * N,)
        for block, P in distributions(model, pixels):                           # (n, V)
            here = P[blank[block].to(P.device)]                                 # (blank ones, V)
            total += P.sum(0, dtype=torch.float32).cpu()
            blank_total += here.sum(0, dtype=torch.float32).cpu()
            taken.update(here.argmax(-1).tolist())
        counts["pages"] += 1
        counts["patches"] += len(blank)
        counts["blank_patches"] += int(blank.sum())
    if counts["pages"] == 0:
        raise InputError("--vocab: no pages to read")
    return total, blank_total, counts, taken


def blank_patches(pixels: Tensor, config: SigLIPConfig) -> Tensor:
    """Tiles (T, 3, S, S) -> which of the T * N patches are of one colour, bool (T * N,)."""
    patch = config.patch_size
    side = config.patches_per_side * patch
    seen = pixels[..., :side, :side]                    # a patch that is cut off is no patch
    patches = seen.unfold(2, patch, patch).unfold(3, patch, patch)      # (T, 3, rows, columns, ...)
    same = patches.amax((-2, -1)) == patches.amin((-2, -1))             # (T, 3, rows, columns)
    return same.all(1).flatten()


def principal_components(E_text: Tensor, kept: Tensor) -> tuple[Tensor, float, float]:
    """All token embeddings E_text (V, D) and some tokens' ids (k,) -> points (V, 2), two shares.

    The points are the first two principal components of all. The first share is that of the
    variance of all embeddings that lies along the first COMPONENTS components of the k tokens; the
    second the most that so many could hold, along those of all. The paper's second version draws
    such a picture (its Figure 4).
    """
    mean, C = spread(E_text)                                                    # (D,), (D, D)
    values, axes = torch.linalg.eigh(C)                 # ascending; a column is an axis
    _, theirs = torch.linalg.eigh(spread(E_text[kept])[1])                      # (D, D)
    theirs = theirs[:, -COMPONENTS:]                                            # (D, COMPONENTS)
    plane = axes[:, -2:].flip(1)                                                # (D, 2)
    points = torch.cat([(rows - mean) @ plane for rows in E_text.split(4096)])  # (V, 2)
    along_theirs = (theirs * (C @ theirs)).sum() / C.trace()
    along_its_own = values[-COMPONENTS:].sum() / C.trace()
    return points.float().cpu(), along_theirs.item(), along_its_own.item()


def refuse_foreign_report(out: Path) -> None:
    """Raise InputError if `out`, or the JSON beside it, is there and `vocab_report` has not written
    it: GPT-2's tokenizer has a vocab.json too."""
    report = out.with_suffix(".json")
    if report.exists() and "tokens_for_99" not in read_json(report):
        raise InputError(f"{report}: is not from --vocab: take another --out")
    if out.exists() and not report.exists():
        raise InputError(f"{out}: without a vocab.json it is not from --vocab: take another --out")


def new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--vocab needs `pip install matplotlib`") from None
    return Figure(figsize=(13, 9), layout="constrained")


def draw_report(figure, report: dict, p: np.ndarray, blank: np.ndarray, points: np.ndarray,
                kept: np.ndarray) -> None:
    """The four panels of the picture.

    p (V,) in falling order, and which of these tokens blank patches take; points (V, 2) of all
    tokens, kept ids.
    """
    ink = {kind: "#%02x%02x%02x" % colour for kind, colour in INK.items()}
    (curve, bars), (share, scatter) = figure.subplots(2, 2)
    rank = np.arange(1, len(p) + 1)

    curve.fill_between(rank, p, p.min() / 2, color=ink["letters"], alpha=0.12, linewidth=0)
    curve.plot(rank, p, color=ink["letters"], linewidth=1, label="every token")
    curve.plot(rank[blank], p[blank], "o", color=ink["digits"], markersize=4,
               label="likeliest of some blank patch")
    title = (f"P_vocab over {report['patches']:,} patches of {report['pages']:,} pages: at most "
             f"{report['highest_probability']:.3g}")
    curve.set(xscale="log", yscale="log", xlabel="tokens, the likeliest first",
              ylabel="mean probability", title=title)
    curve.legend(frameon=False)

    share.plot(rank, p.cumsum(), color=ink["letters"])
    for part, n in (0.9, report["tokens_for_90"]), (0.99, report["tokens_for_99"]):
        share.plot([1, n, n], [part, part, 0], color=ink["white space"], linewidth=0.8,
                   linestyle="--")
        share.annotate(f"{part:.0%}: {n:,} tokens", (1, part), (0, -13),
                       textcoords="offset points")
    share.set(xscale="log", xlabel="tokens, the likeliest first", ylabel="of the probability",
              ylim=(0, 1.04), title=f"what the first of {report['tokens']:,} tokens hold")

    rows = report["likeliest"][::-1]
    taken = {row["id"] for row in report["blank"]}
    bars.barh(range(len(rows)), [row["probability"] for row in rows],
              color=[ink["digits"] if row["id"] in taken else ink["letters"] for row in rows])
    bars.set_yticks(range(len(rows)), [row["token"].replace("$", r"\$") for row in rows])
    bars.set(xlabel="mean probability", title="the likeliest tokens (orange: of blank patches)")

    for some, colour, size, label in [
            (points, "#c9ccd4", 2, "all tokens"),
            (points[kept], ink["letters"], 3, "those that hold 99 %"),
            (points[kept[:report["tokens_for_90"]]], ink["digits"], 3, "those that hold 90 %")]:
        scatter.plot(*some.T, "o", color=colour, markersize=size, label=label)
    title = (f"{report['components']} axes of the 99 %: {report['variance_along_theirs']:.0%} of "
             f"all variance (at best {report['variance_along_its_own']:.0%})")
    scatter.set(xlabel="first principal component of E_text", ylabel="second", title=title)
    scatter.legend(frameon=False)


def summary_line(report: dict, out: Path) -> str:
    """What --vocab found, in a sentence."""
    likeliest = report["likeliest"][0]
    blank = report["blank"][0] if report["blank"] else {"token": "-", "patches": 0.0}
    return (f"{report['tokens_for_90']:,} of {report['tokens']:,} tokens hold 90 % of the "
            f"probability, {report['tokens_for_99']:,} hold 99 %; the likeliest, "
            f"{likeliest['token']}, has {likeliest['probability']:.3f}; {blank['patches']:.1%} of "
            f"the blank patches become {blank['token']}: {out}/vocab.png and vocab.json")
