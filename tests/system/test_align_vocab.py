"""paper/align_vocab.py: the tokens that Align can do with are chosen, stored and used."""
import json

import pytest
import torch

import connector
from conftest import close, randomise
from connector import Align, AlignTopK, spread
from model import IMAGE, AlignVLM, AlignVLMConfig
from paper.align_vocab import ALIGN_VOCAB, choose_align_vocab, choose_tokens, use_align_vocab
from plumbing.settings import CheckpointError, InputError
from small_models import LLM, VISION


def align_and_pages(*shape: int):
    """A connector with V = 200, and F (*shape, d) of some pages."""
    generator = torch.Generator().manual_seed(3)
    align = randomise(Align(24, 16, 200).double())
    F = torch.randn(*shape, 24, generator=generator, dtype=torch.float64)
    E_text = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    return align, F, E_text, generator


def top_K(align: Align, token_ids) -> AlignTopK:
    return AlignTopK(align, torch.as_tensor(token_ids), *spread(align.W2.weight))


def test_more_tokens_change_less(monkeypatch):
    """Chosen are those with most probability.

    On an unseen page too what they change falls as K grows. In blocks of 16 visual tokens.
    """
    monkeypatch.setattr(connector, "BLOCK_BYTES", 1)
    monkeypatch.setattr(connector, "CACHE_BYTES", 1)
    align, F, E_text, generator = align_and_pages(3, 40)
    with torch.no_grad():       # some tokens matter more
        align.norm_V.bias += 2 * torch.randn(200, generator=generator, dtype=torch.float64)
    mass = align.p_vocab(F).sum((0, 1))
    measured = []
    for K in (1, 5, 20, 100, 200):
        token_ids, deviation = choose_tokens(align, list(F), E_text, K)
        assert torch.equal(token_ids, mass.topk(K).indices)
        measured.append(deviation)
    for name, sign in [("probability", 1), ("mean_cosine_distance", -1),
                       ("largest_relative_error", -1)]:
        values = [sign * deviation[name] for deviation in measured]
        assert values == sorted(values) and values[0] < values[-2] < values[-1]
    assert measured[-1]["probability"] == 1
    assert measured[-1]["largest_relative_error"] < 1e-12


def test_each_page_is_measured_with_the_tokens_of_the_others():
    align, F, E_text, _ = align_and_pages(2, 40)
    a, b = F
    P = [align.p_vocab(page).sum(0) for page in (a, b)]
    _, deviation = choose_tokens(align, [a, b], E_text, 10)
    kept = [mine[other.topk(10).indices].sum() / mine.sum() for mine, other in (P, P[::-1])]
    assert deviation["probability"] == pytest.approx(sum(kept).item() / 2, rel=1e-12)
    _, alone = choose_tokens(align, [a], E_text, 10)
    best = P[0].topk(10)
    expected = best.values.sum() / P[0].sum()
    assert alone["probability"] == pytest.approx(expected.item(), rel=1e-12)
    full, few = align(a, E_text), top_K(align, best.indices)(a, E_text)
    error = ((few - full).norm(dim=-1) / full.norm(dim=-1)).max().item()
    assert alone["largest_relative_error"] == pytest.approx(error, rel=1e-9)
    cosine = 1 - (few * full).sum(-1) / few.norm(dim=-1) / full.norm(dim=-1)
    assert alone["mean_cosine_distance"] == pytest.approx(cosine.mean().item(), rel=1e-9)


@pytest.fixture
def vlm() -> AlignVLM:
    """With V = 23."""
    return randomise(AlignVLM(AlignVLMConfig(VISION, LLM)).double())


TOKENS = torch.full((1, 2 * VISION.n_patches), IMAGE)       # two tiles and not a token of text


def test_chosen_tokens_are_stored_and_used(vlm, tmp_path):
    """Through the folder and back."""
    pixels = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    full = vlm.embed(TOKENS, pixels)
    with pytest.raises(CheckpointError, match="no such file: choose this model's tokens"):
        use_align_vocab(vlm, tmp_path)
    for K in (0, 24):
        with pytest.raises(InputError, match="from 1 to 23"):
            choose_align_vocab(vlm, tmp_path, [pixels], K)
    assert not list(tmp_path.iterdir())
    deviation = choose_align_vocab(vlm, tmp_path, list(pixels[:, None]), 9)
    stored = json.loads((tmp_path / ALIGN_VOCAB).read_text())
    token_ids = stored.pop("tokens")
    assert stored == deviation and deviation["pages"] == 2 and len(token_ids) == 9
    assert list(tmp_path.iterdir()) == [tmp_path / ALIGN_VOCAB]
    assert torch.equal(vlm.embed(TOKENS, pixels), full)         # choosing changes nothing yet

    F = vlm.vision(pixels).flatten(0, 1)
    E_text, align = vlm.llm.embed_tokens.weight, vlm.connector
    use_align_vocab(vlm, tmp_path)
    expected = top_K(align, token_ids)(F, E_text).detach()
    close(vlm.embed(TOKENS, pixels)[0].detach(), expected, 1e-12)


@pytest.mark.parametrize("bad", [
    "", '{"tokens": [0, 1', "[]", "{}", '{"tokens": 3}', '{"tokens": [0, 1, 23]}',
    '{"tokens": [0, 1, -1]}', '{"tokens": [0, 1, 1]}', '{"tokens": [0, 1, true]}',
    '{"tokens": [0, 1, 2.0]}', '{"tokens": []}'])
def test_what_is_no_choice_of_this_vocabulary_is_refused_in_one_line(bad, vlm, tmp_path):
    (tmp_path / ALIGN_VOCAB).write_text(bad)
    with pytest.raises(CheckpointError) as error:
        use_align_vocab(vlm, tmp_path)
    assert str(tmp_path / ALIGN_VOCAB) in str(error.value) and "\n" not in str(error.value)
