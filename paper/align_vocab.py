"""The few tokens that the Align connector can do with (the paper's second version).

    python -m paper.align_vocab out/toy/stage3 100 pages/*.png  # choose 100, and store them there
    python sample.py --checkpoint out/toy/stage3 --image doc.png --align-vocab  # with these alone

The k tokens that carry P_vocab on some pages are stored in the model's folder, in align_vocab.json.
AlignTopK mixes only them.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as nnf       # F is the paper's name for the features
from torch import Tensor

from connector import Align, AlignTopK, spread, token_blocks
from model import AlignVLM
from plumbing.files import write_text
from plumbing.images import read_pages
from plumbing.processes import run_main
from plumbing.settings import CheckpointError, InputError, Settings, tile_limit
from plumbing.weights import model_folder
from vision import tile

ALIGN_VOCAB = "align_vocab.json"        # in a model's folder


@torch.inference_mode()
def choose_tokens(align: Align, pages: list[Tensor], E_text: Tensor,
                  k: int) -> tuple[Tensor, dict[str, float]]:
    """The k tokens with most probability over all features F (N, d) of some pages.

    Returns their ids (k,), and what it changes in F' to mix only them. Of several pages each is
    measured with the tokens that the others would choose. Measured are the share of the probability
    that lies on them, the mean cosine distance of F' with them from F', and its largest relative
    error.
    """
    m, C = spread(align.W2.weight)                                      # (D,), (D, D)
    # (pages, V)
    mass = torch.stack([probability_mass(align, F, len(E_text), m.dtype) for F in pages])
    kept, distances, errors = [], [], []
    for i, F in enumerate(pages):
        others = [j for j in range(len(pages)) if j != i] or [i]
        token_ids = mass[others].sum(0).topk(k).indices                 # (k,)
        few = AlignTopK(align, token_ids, m, C)(F, E_text).to(m.dtype)  # (N, D)
        full = align(F, E_text).to(m.dtype)                             # (N, D)
        kept.append(mass[i, token_ids].sum() / mass[i].sum())
        distances.append(1 - nnf.cosine_similarity(few, full, dim=-1))
        errors.append((few - full).norm(dim=-1) / full.norm(dim=-1))
    deviation = {"probability": torch.stack(kept).mean().item(),
                 "mean_cosine_distance": torch.cat(distances).mean().item(),
                 "largest_relative_error": torch.cat(errors).max().item()}
    return mass.sum(0).topk(k).indices, deviation


def probability_mass(align: Align, F: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """P_vocab summed over the features F (N, d) of a page -> (V,)."""
    mass = torch.zeros(V, dtype=dtype, device=F.device)
    for block in token_blocks(len(F), 12 * V):      # three fp32 rows: the logits, their norm, P
        mass += align.p_vocab(F[block]).sum(0, dtype=dtype)
    return mass


@torch.inference_mode()
def choose_align_vocab(model: AlignVLM, folder: Path, pixels: list[Tensor], k: int) -> dict:
    """Choose the k tokens that carry P_vocab on some pages, tiles (T, 3, S, S) of each.

    Writes them to ALIGN_VOCAB in the model's folder, with what they change in F' (choose_tokens),
    and returns the latter. Raises InputError if the vocabulary has no k tokens.
    """
    E_text = model.llm.embed_tokens.weight                              # (V, D)
    if not 1 <= k <= len(E_text):
        raise InputError(f"k is {k}: keep from 1 to {len(E_text)} tokens")
    pages = [model.vision(page.to(E_text.device)).flatten(0, 1) for page in pixels]     # F each
    token_ids, deviation = choose_tokens(model.connector, pages, E_text, k)
    deviation = {"pages": len(pages), **deviation}
    text = json.dumps({**deviation, "tokens": token_ids.tolist()}) + "\n"
    if (folder / ALIGN_VOCAB).is_symlink():     # to a file of the hub's cache, which stays as it is
        (folder / ALIGN_VOCAB).unlink()
    write_text(folder / ALIGN_VOCAB, text)
    return deviation


def use_align_vocab(model: AlignVLM, folder: str | Path) -> None:
    """From here on the connector mixes only the tokens that were chosen: for inference.

    Replaces model.connector. Raises InputError for a connector that mixes no tokens, and
    CheckpointError if the folder holds none, or no ids of this vocabulary.
    """
    folder = model_folder(folder)
    check_align(model, folder)
    if not (folder / ALIGN_VOCAB).exists():
        raise CheckpointError(f"{folder / ALIGN_VOCAB}: no such file: choose this model's tokens "
                              "with `python -m paper.align_vocab` first")
    settings = Settings(folder / ALIGN_VOCAB)
    ids = settings.values.get("tokens")
    V = model.config.llm.vocab_size
    if (not isinstance(ids, list) or not all(type(i) is int and 0 <= i < V for i in ids)
            or not ids or len(set(ids)) < len(ids)):
        raise settings.error("tokens", f"is not a list of different token ids from 0 to {V - 1}: "
                             "choose them anew")
    W2 = model.connector.W2.weight                                      # (V, D)
    m, C = spread(W2)
    model.connector = AlignTopK(model.connector, torch.tensor(ids, device=W2.device), m, C)


def check_align(model: AlignVLM, folder: Path) -> None:
    """Raises InputError for a model whose connector mixes none of the LLM's tokens."""
    kind = model.config.connector.kind
    if kind != "align":
        raise InputError(f"{folder} has the connector {kind}, which mixes none of the LLM's tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.align_vocab", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="model folder, or a name on the hub (align_vocab.json is then written "
        "into its copy in the cache)")
    add("k", type=int, help="tokens to keep")
    add("images", nargs="+", metavar="image", help="pages that say which")
    add("--max-tiles", type=tile_limit, help="tiles a page is cut into at most (default: what the "
        "model's config.json says)")
    args = parser.parse_args()
    args.checkpoint = model_folder(args.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AlignVLM.from_pretrained(args.checkpoint, device=device).eval()
    check_align(model, args.checkpoint)
    pixels = [tile(page, model.config.vision, args.max_tiles)           # (T, 3, S, S) each
              for image in args.images for page in read_pages(image)]
    print(json.dumps(choose_align_vocab(model, args.checkpoint, pixels, args.k)))


if __name__ == "__main__":
    run_main(main)
