"""The words that the Align connector can do with (second version): K that carry P_vocab on some pages, for AlignTopK.

    python sample.py --align-vocab 100 --choose-from pages/*.png        # choose them, and store them with the model
    python sample.py --align-vocab 100 --image doc.png                  # with these words alone
"""
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from connector import Align, AlignTopK, blocks, spread
from model import AlignVLM
from plumbing.settings import CheckpointError, InputError, Settings

ALIGN_VOCAB = "align_vocab.json"    # in a model's folder: the words that the connector can do with


@torch.inference_mode()
def choose_words(align: Align, pages: list[Tensor], E_text: Tensor, K: int) -> tuple[Tensor, dict[str, float]]:
    """The K words with most probability over all features F (N, d) of the pages, ids (K,), and what they change in F'.

    Of several pages each is measured with the words that the others would choose. Measured are the share of the
    probability that lies on them, the mean cosine distance of F' with them from F', and its largest relative error.
    """
    m, C = spread(align.W2.weight)
    V = len(E_text)
    mass = torch.stack([sum(align.p_vocab(F[block]).sum(0, dtype=m.dtype) for block in blocks(len(F), 12 * V))
                        for F in pages])                                # (pages, V)
    kept, distances, errors = [], [], []
    for i, F in enumerate(pages):
        others = [j for j in range(len(pages)) if j != i or len(pages) == 1]
        words = mass[others].sum(0).topk(K).indices
        few, full = (x.to(m.dtype) for x in (AlignTopK(align, words, m, C)(F, E_text), align(F, E_text)))   # (N, D)
        kept.append(mass[i, words].sum() / mass[i].sum())
        distances.append(1 - nnf.cosine_similarity(few, full, dim=-1))
        errors.append((few - full).norm(dim=-1) / full.norm(dim=-1))
    deviation = {"probability": torch.stack(kept).mean(), "mean_cosine_distance": torch.cat(distances).mean(),
                 "largest_relative_error": torch.cat(errors).max()}
    return mass.sum(0).topk(K).indices, {name: value.item() for name, value in deviation.items()}


@torch.inference_mode()
def choose_align_vocab(model: AlignVLM, folder: Path, pixels: list[Tensor], K: int) -> dict:
    """Choose the K words that carry P_vocab on some pages, tiles (T, 3, S, S) of each, for use_align_vocab.

    Writes them to ALIGN_VOCAB in the model's folder, with what they change in F' (choose_words), and returns
    the latter. Raises InputError if the vocabulary has no K words.
    """
    E_text = model.llm.embed_tokens.weight
    if not 1 <= K <= len(E_text):
        raise InputError(f"{K} words to keep: the vocabulary has {len(E_text)}")
    pages = [model.vision(page.to(E_text.device, E_text.dtype)).flatten(0, 1) for page in pixels]   # F (T * N, d) each
    words, deviation = choose_words(model.connector, pages, E_text, K)
    deviation = {"pages": len(pages), **deviation}
    partial = folder / f"{ALIGN_VOCAB}.partial"
    partial.write_text(json.dumps({**deviation, "words": words.tolist()}) + "\n")
    os.replace(partial, folder / ALIGN_VOCAB)
    return deviation


def use_align_vocab(model: AlignVLM, folder: Path, K: int) -> None:
    """From here on the connector mixes only the K words that choose_align_vocab stored in the folder: for inference.

    Raises CheckpointError if it holds none, others than K, or no ids of this vocabulary.
    """
    if not (folder / ALIGN_VOCAB).exists():
        raise CheckpointError(f"{folder / ALIGN_VOCAB}: no such file: no words have been chosen for this model yet")
    settings = Settings(folder / ALIGN_VOCAB)
    words, V = settings.values.get("words"), model.config.llm.vocab_size
    if not isinstance(words, list) or not all(type(i) is int and 0 <= i < V for i in words):
        raise settings.error("words", f"is not a list of word ids from 0 to {V - 1}")
    if len(words) != K or len(set(words)) != K:
        raise settings.error("words", f"holds {len(set(words))} words, not {K}: choose them anew")
    W2 = model.connector.W2.weight
    model.connector = AlignTopK(model.connector, torch.tensor(words, device=W2.device), *spread(W2))
