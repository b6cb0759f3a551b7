"""An answer as a document for the browser: what every patch became, and where the LLM looked.

    python sample.py --image doc.png --prompt "what is NO?" --explain page.html

The document is one file: paper/explorer.html with the numbers of this answer in it. It opens by a
double click, without a server or a network. Numbers are base64 of little-endian arrays:

    P_vocab     the TOP likeliest tokens of every patch, fp32
    attention   of each step of the answer over the patches, mean over heads, a byte each

A step is a token of the answer, or its end. Of answers of up to WHOLE tokens all attention is
there, of longer ones each layer's STRONGEST patches.
"""
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import Tokenizer, prepare_question
from model import CIRCLES, AlignVLM, goes_in_circles
from paper.patch_tokens import INK, distributions_of, named, patch_boxes
from plumbing.examples import IMAGE
from plumbing.files import numbered, write_text
from plumbing.images import read_pages
from plumbing.pdf import page_numbers
from plumbing.settings import InputError
from vision import tile_boxes

TEMPLATE = Path(__file__).with_name("explorer.html")
MARK = "NUMBERS OF THE ANSWER"      # stands in the template where the JSON goes
TOP = 10                # tokens of a patch
OTHERS = 5              # tokens that were likeliest instead of an answer's
WHOLE = 32              # an answer of at most so many tokens keeps the attention of every patch
STRONGEST = 128         # patches of a step and layer that are kept of a longer answer
PICTURE = 1600          # pixels of a page's longer side, at most
KINDS = list(INK)

# -------------------------------------------------------------------------------------------------
# What the model does while it answers


class Watch:
    """Notes what a model does while it answers one prompt; `with Watch(model, places):`.

    places (n,): where the visual tokens stand in the prompt. Each layer's attention and the LM
    head go through functions of this class for as long. The encoder and the LLM run once. Only the
    attention row of a step's own position is made again, since PyTorch's kernel shows none;
    `explore` makes P_vocab again from F.

    Of each step the layers come first, then the LM head: `end_layer` and `logits` note them. Then
    generate yields the token; P holds the step's probabilities at temperature 1. Afterwards:
    features F (T, N, d), of the only pass of the encoder; steps, likeliest and on_patches of all
    steps.
    """

    def __init__(self, model: AlignVLM, places: Tensor):
        self.model, self.llm = model, model.llm
        self.places = places.to(model.llm.embed_tokens.weight.device)
        # The Perceiver's tokens have no place in their tile: they are shown as one.
        self.group = model.config.tile_tokens if is_perceiver(model) else 1
        self.features = None
        self.rows: list[Tensor] = []                        # of this step, (n,) of each layer
        self.steps: list[tuple[Tensor, Tensor | None]] = []
        self.on_patches: list[Tensor] = []                  # (layers + 1,) of each step
        self.P = None               # (V,), of the last step, at temperature 1
        self.likeliest: list[tuple[Tensor, Tensor]] = []    # ids and probabilities of each step

    def __enter__(self) -> "Watch":
        self.hook = self.model.vision.register_forward_hook(self.see)
        self.attends = [layer.self_attn.attend for layer in self.llm.layers]
        for layer, attend in zip(self.llm.layers, self.attends):
            layer.self_attn.attend = self.watched(attend)
        self.llm.logits = self.logits
        # On a GPU this is a graph that plumbing/fast.py has made, into which nobody can look.
        self.graph = vars(self.llm).pop("next_hidden", None)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()
        for layer, attend in zip(self.llm.layers, self.attends):
            layer.self_attn.attend = attend
        del self.llm.logits
        if self.graph is not None:
            self.llm.next_hidden = self.graph

    def see(self, module, args, F: Tensor) -> None:
        self.features = F

    def watched(self, attend):
        """attend, which from now on also notes a row of attention."""
        def attend_and_note(q, k, v, attn_mask=None, **options):
            mask = None if attn_mask is None else attn_mask[0, 0, -1]       # (reach,)
            weights = attention_row(q[0, :, -1], k[0], mask)                # (reach,)
            self.end_layer(weights[self.places])
            return attend(q, k, v, attn_mask=attn_mask, **options)
        return attend_and_note

    def end_layer(self, row: Tensor) -> None:
        """Note a layer's attention over the visual tokens (n,); after the last one, the step."""
        self.rows.append(row.view(-1, self.group).sum(-1))
        if len(self.rows) < len(self.llm.layers):
            return
        weights = torch.stack(self.rows)                                    # (layers, n)
        weights = torch.cat([weights.mean(0, keepdim=True), weights])       # (layers + 1, n)
        self.rows = []
        self.on_patches.append(weights.sum(-1).cpu())
        step = weights.cpu(), None
        self.steps.append(step if len(self.steps) <= WHOLE else strongest(step))

    def logits(self, h: Tensor) -> Tensor:
        """Llama.logits: h (1, D) -> (1, V); notes the likeliest tokens of this step."""
        logits = type(self.llm).logits(self.llm, h)
        self.P = logits[0].float().softmax(-1)                              # (V,)
        p, ids = self.P.topk(min(OTHERS + 1, len(self.P)))
        self.likeliest.append((ids.cpu(), p.cpu()))
        return logits

    def attention(self) -> tuple[Tensor, Tensor | None]:
        """All steps': weights (steps, layers + 1, n), and None as they are all there.

        Layer 0 is the mean of all. Of a long answer weights (steps, layers + 1, STRONGEST) and
        their patches (steps, layers + 1, STRONGEST).
        """
        steps = self.steps
        if len(steps) <= WHOLE + 1:         # with the step that ends the answer
            return torch.stack([weights for weights, _ in steps]), None
        steps = [strongest(step) for step in steps]
        return tuple(torch.stack(part) for part in zip(*steps))


def is_perceiver(model: AlignVLM) -> bool:
    return model.config.connector.kind == "perceiver"


def attention_row(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """One query's attention, the mean over heads (reach,): the softmax of q k^T / sqrt(head_dim).

    q (heads, head_dim), k (kv_heads, reach, head_dim): heads / kv_heads queries share a key.
    mask (reach,): -inf at what lies later.
    """
    kv_heads, _, head_dim = k.shape
    q = q.float().unflatten(0, (kv_heads, -1))                  # (kv_heads, group, head_dim)
    scores = q @ k.float().transpose(1, 2) * head_dim ** -0.5   # (kv_heads, group, reach)
    if mask is not None:
        scores = scores + mask.float()
    return scores.softmax(-1).mean((0, 1))                      # (reach,)


def strongest(step: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Weights (layers + 1, n) -> the STRONGEST of each layer and the patches they are of."""
    weights, patches = step
    if patches is None:
        weights, patches = weights.topk(min(STRONGEST, weights.shape[1]))
    return weights, patches


def top_tokens(model: AlignVLM, F: Tensor) -> tuple[Tensor, Tensor]:
    """F (n_patches, d) -> the likeliest tokens of each patch, ids and p (n_patches, TOP)."""
    ids, probabilities = [], []
    for _, P in distributions_of(model, F):                                 # (n, V)
        p, best = P.float().topk(min(TOP, P.shape[-1]))
        ids.append(best.cpu())
        probabilities.append(p.cpu())
    return torch.cat(ids), torch.cat(probabilities)


# -------------------------------------------------------------------------------------------------
# From an answer to a document


def explain(model: AlignVLM, tokenizer: Tokenizer, files: list[Path], out: Path, prompt: str,
            together: bool, chosen: str | None, max_tiles: int | None = None, **generation) -> None:
    """--explain: pictures if `out` is a PNG, else a document to explore.

    together: the images are asked about in one prompt, and one document shows them. Otherwise each
    has its own, numbered. chosen: --pages. generation: what AlignVLM.generate takes. Raises
    InputError.
    """
    if out.suffix.lower() == ".png":
        from paper.patch_tokens import explain_files
        return explain_files(model, tokenizer, files, out, max_tiles, chosen)
    groups = [files] if together else [[file] for file in files]
    paths = numbered(out, len(groups), files)
    for group, path in zip(groups, paths):
        pages, names = [], []
        for file in group:
            images = read_pages(file, chosen)
            pages += images
            names += page_names(file, len(images), chosen)
        text = explore(model, tokenizer, pages, names, prompt, path, max_tiles, **generation)
        print(f"{text}\n{path}: open it in a browser", flush=True)


def page_names(file: Path, n: int, chosen: str | None) -> list[str]:
    """What the n pages that were read of a file are called."""
    if n == 1 and not chosen:
        return [file.name]
    numbers = range(1, n + 1)
    if chosen:                                  # they were read: none is beyond the file's last one
        numbers = page_numbers(chosen, 10 ** 9)
    return [f"{file.name}, page {number}" for number in numbers]


@torch.inference_mode()
def explore(model: AlignVLM, tokenizer: Tokenizer, pages: list[Image.Image], names: list[str],
            prompt: str, out: Path, max_tiles: int | None = None, **generation) -> str:
    """Answer a prompt about pages and write the document to `out`; returns the answer.

    A connector that mixes no tokens leaves the attention alone. The tokens that the Perceiver makes
    of a tile have no place in it: their attention is added up to that of the tile. Raises
    InputError.
    """
    tokens, pixels = prepare_question(model, tokenizer, pages, prompt, max_tiles)
    places = (tokens == IMAGE).nonzero()[:, 0]                              # (n,)
    ids, p = [], []
    with Watch(model, places) as watch:
        for [token] in model.generate([tokens], [pixels], tokenizer.stop, **generation):
            ids.append(token)
            p.append(watch.P[token].item())
    steps = ids.copy()
    if goes_in_circles(ids):
        print(f"ended: the last {CIRCLES} tokens repeat themselves", file=sys.stderr)
    elif len(watch.likeliest) > len(ids):       # one step more, at which the answer ended
        end = max(tokenizer.stop, key=lambda token: watch.P[token].item())
        steps.append(end)
        p.append(watch.P[end].item())

    tops = None
    if hasattr(model.connector, "p_vocab"):
        tops = top_tokens(model, watch.features.flatten(0, 1))              # (T * N, TOP) each
    table = TokenTable(tokenizer)
    write_text(out, document({
        "prompt": prompt,
        "connector": type(model.connector).__name__,
        "vocabulary": model.config.llm.vocab_size,
        "layers": model.config.llm.n_layers,
        "visualTokens": len(places),
        "tilesAlone": is_perceiver(model),
        "kinds": KINDS,
        "images": [image_of(page, name, model, max_tiles) for page, name in zip(pages, names)],
        "patches": patches_of(tops, table),
        "answer": steps_of(steps, p, watch.likeliest, len(ids), table),
        "attention": attention_of(*watch.attention(), torch.stack(watch.on_patches)),
        "tokens": table.rows,
    }))
    return tokenizer.decode(ids)


class TokenTable:
    """The tokens that a document names, each once: rows of its id, its text and its kind."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.rows: list[tuple[int, str, int]] = []
        self.row_of: dict[int, int] = {}

    def row(self, i: int) -> int:
        """The row of a token's id."""
        if i not in self.row_of:
            text, kind = named(self.tokenizer, i)
            self.row_of[i] = len(self.rows)
            self.rows.append((i, text, KINDS.index(kind)))
        return self.row_of[i]


def image_of(page: Image.Image, name: str, model: AlignVLM, max_tiles: int | None) -> dict:
    """A page: its size, a picture of it, and its tiles by the edges of their patches.

    A tile of the Perceiver's counts as a single patch.
    """
    config = model.config.vision
    tiles = []
    for box in tile_boxes(*page.size, config, max_tiles):
        edges = patch_boxes(box, config)                                    # (N, 4)
        side = config.patches_per_side
        xs = [*edges[:side, 0], edges[-1, 2]]                               # side + 1 of them
        ys = [*edges[::side, 1], edges[-1, 3]]
        if is_perceiver(model):
            xs, ys = box[0::2], box[1::2]
        tiles.append({"xs": np.round(xs, 2).tolist(), "ys": np.round(ys, 2).tolist()})
    return {"name": name, "width": page.width, "height": page.height, "tiles": tiles,
            "picture": picture(page)}


def picture(page: Image.Image) -> str:
    """A page as a data URL, not larger than a screen: PNG or JPEG, whichever is shorter."""
    small = page.copy()
    small.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    shortest = None
    for kind, options in ("png", {"optimize": True}), ("jpeg", {"quality": 85}):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        if shortest is None or buffer.tell() < len(shortest[1]):
            shortest = kind, buffer.getvalue()
    kind, data = shortest
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def patches_of(tops: tuple[Tensor, Tensor] | None, table: TokenTable) -> dict | None:
    """Each patch's likeliest tokens, as rows of the table, and their probabilities."""
    if tops is None:
        return None
    ids, p = tops                                                           # (n, TOP)
    distinct, index = ids.unique(return_inverse=True)
    rows = torch.tensor([table.row(i) for i in distinct.tolist()])[index]   # (n, TOP)
    return {"top": ids.shape[1], "rows": base64_of(rows, "<u4"), "p": base64_of(p, "<f4")}


def steps_of(steps: list[int], chosen: list[float], likeliest: list[tuple[Tensor, Tensor]],
             n_tokens: int, table: TokenTable) -> list[dict]:
    """Each step's token, its probability, and the tokens that were likeliest instead.

    A step after n_tokens is the end of the answer.
    """
    rows = []
    for step, (token, probability, (others, p)) in enumerate(zip(steps, chosen, likeliest)):
        pairs = zip(others.tolist(), p.tolist())
        instead = [[table.row(i), q] for i, q in pairs if i != token]
        rows.append({"row": table.row(token), "p": probability, "end": step == n_tokens,
                     "others": instead[:OTHERS]})
    return rows


def attention_of(weights: Tensor, patches: Tensor | None, on_patches: Tensor) -> dict:
    """Weights (steps, layers + 1, n) as bytes: scale * (byte / 255)^2.

    So what is weak is told more finely. scale (steps, layers + 1) is the strongest of a row;
    on_patches (steps, layers + 1) the sum of it, before anything was left out.
    """
    scale = weights.amax(-1, keepdim=True)                                  # (steps, layers + 1, 1)
    shares = (weights / scale.clamp(min=1e-30)).sqrt()
    return {"kept": weights.shape[-1], "scale": base64_of(scale, "<f4"),
            "on_patches": base64_of(on_patches, "<f4"),
            "bytes": base64_of((255 * shares).round(), "u1"),
            "patches": None if patches is None else base64_of(patches, "<u4")}


def base64_of(numbers: Tensor, kind: str) -> str:
    """Numbers of any shape, one after another, as the little-endian type that numpy calls kind."""
    return base64.b64encode(numbers.contiguous().numpy().astype(kind).tobytes()).decode()


def document(numbers: dict) -> str:
    """The document's text. No text in it can become markup: JSON has no need of a "<"."""
    text = json.dumps(numbers, separators=(",", ":")).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    return before + text + after
