"""The document that --explain writes: its numbers are read back and compared with the model's."""
import base64
import io
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from conftest import close, randomise, sample
from connector import AlignTopK, spread
from data import Tokenizer, prepare_question
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM
from paper import explorer
from paper.patch_tokens import named, patch_boxes
from plumbing import fast
from plumbing.images import read_image
from plumbing.settings import InputError
from sample import answer
from shipped import ANSWER, ASK, PAGE
from test_llama_oracle import their_config
from toy.pages import SYMBOLS, Page, draw, write_toy_tokenizer
from vision import tile_boxes

EVIL = "</script><script>alert(1)</script><!--<script>\u2028]]>\"'&lt;"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_toy_tokenizer(path)
    return Tokenizer(path)


def vlm(kind="align", **connector) -> AlignVLM:
    """A toy with random weights; two of its four query heads share a key.

    Its queries are long, so that each layer attends to few tokens.
    """
    preset = ALIGNVLM_PRESETS["toy"]
    config = replace(preset, llm=replace(preset.llm, n_kv_heads=2),
                     connector=replace(preset.connector, kind=kind, **connector))
    model = randomise(AlignVLM(config), 1).eval()
    with torch.no_grad():
        for layer in model.llm.layers:
            layer.self_attn.q_proj.weight *= 4
    return model


class Reader(HTMLParser):
    """What a browser sees of a document: its scripts, and the addresses in it."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.addresses, self.is_script = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.is_script = tag == "script"
        if self.is_script:
            self.scripts.append((dict(attributes), ""))
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        if self.is_script:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


def read(path) -> SimpleNamespace:
    """A document's numbers, its arrays as tensors in the shapes that they have."""
    (attributes, text), (_, program) = Reader(path.read_text(encoding="utf-8")).scripts
    assert attributes == {"type": "application/json", "id": "numbers"}
    assert program.rstrip().endswith("start();")
    numbers = SimpleNamespace(**json.loads(text))

    def array(code, kind, *shape):
        values = np.frombuffer(base64.b64decode(code), kind)
        return torch.from_numpy(values.astype(kind[1:])).view(*shape)

    if numbers.patches:
        top = numbers.patches["top"]
        numbers.p = array(numbers.patches["p"], "<f4", -1, top)
        rows = array(numbers.patches["rows"], "<u4", -1, top).long()
        numbers.ids = torch.tensor([i for i, _, _ in numbers.tokens])[rows]
    steps, kept = len(numbers.answer), numbers.attention["kept"]
    shape = steps, numbers.layers + 1
    numbers.scale = array(numbers.attention["scale"], "<f4", *shape, 1)
    numbers.on_patches = array(numbers.attention["on_patches"], "<f4", *shape)
    bytes_ = array(numbers.attention["bytes"], "=u1", *shape, kept)
    numbers.weights = numbers.scale * (bytes_ / 255) ** 2
    numbers.places = None
    if numbers.attention["patches"]:
        numbers.places = array(numbers.attention["patches"], "<u4", *shape, kept).long()
    return numbers


@torch.no_grad()
def expected_of(model: AlignVLM, tokenizer, pages, prompt, ids) -> tuple:
    """By transformers, from one pass over the prompt and the answer, without a cache:
    P over all tokens (steps, V), attention (steps, layers, n) of a mean head to the patches."""
    asked, pixels = prepare_question(model, tokenizer, pages, prompt, 9)
    tokens = torch.cat([asked, torch.tensor(ids, dtype=torch.int64)])
    x = model.embed(tokens[None], pixels)
    theirs = LlamaForCausalLM(their_config(model.config.llm)).eval()
    theirs.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": p
                            for name, p in model.llm.state_dict().items()})
    out = theirs(inputs_embeds=x, output_attentions=True)
    first = len(asked) - 1                            # chooses the first token
    places = (asked == IMAGE).nonzero()[:, 0]
    attention = torch.stack([weights[0].mean(0) for weights in out.attentions], 1)
    return out.logits[0, first:].softmax(-1), attention[first:, :, places]


def close_weights(numbers, expected) -> None:
    """Attention as far as a byte tells it: half of the way to the next byte's."""
    with_mean = torch.cat([expected.mean(1, keepdim=True), expected], 1)
    close(numbers.on_patches, with_mean.sum(-1), 1e-4)
    if numbers.places is not None:
        strongest = with_mean.topk(numbers.places.shape[-1]).values
        with_mean = with_mean.gather(-1, numbers.places)
        close(with_mean.sort(descending=True).values, strongest, 1e-4)
    close(numbers.scale, with_mean.amax(-1, keepdim=True), 1e-4)
    error = (numbers.weights - with_mean).abs() / numbers.scale
    step = with_mean.div(numbers.scale).clamp(min=0).sqrt() / 255 + 255 ** -2
    assert (error <= step + 1e-4).all()


def toy_page(side: int) -> Image.Image:
    """A page of side x side characters, as the toy's are drawn: of 8 they fill one tile, of 24
    nine."""
    rng = random.Random(side + 1)
    page = Page("letter", side, side)
    for row in range(side):
        page.write(row, (0, "".join(rng.choices(SYMBOLS + " ", k=side))))
    return draw(page)


ONE, NINE = toy_page(8), toy_page(24)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A toy with random weights, saved."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    vlm().save_pretrained(folder, tokenizer.path, torch.float32)
    return folder


# -------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("pages", [[ONE], [NINE], [NINE, ONE]], ids=["one", "nine", "both"])
@pytest.mark.parametrize("is_fast", [False, True])
def test_numbers_are_the_models(tokenizer, tmp_path, pages, is_fast):
    model = vlm()
    *_, [said] = answer(model, tokenizer, [pages], ["what is NO?"], max_new_tokens=6)
    tokens, pixels = prepare_question(model, tokenizer, pages, "what is NO?", 9)
    with torch.no_grad():
        P = model.connector.p_vocab(model.vision(pixels)).flatten(0, 1)     # (n, V)
    ids = [i for [i] in model.generate([tokens], [pixels], tokenizer.stop, 6)]
    P_next, attention = expected_of(model, tokenizer, pages, "what is NO?", ids[:-1])
    if is_fast:
        fast.use(model, inference=True)
    out = tmp_path / "page.html"
    names = ["a", "b"][:len(pages)]
    text = explorer.explore(model, tokenizer, pages, names, "what is NO?", out, max_new_tokens=6)
    numbers = read(out)
    assert text == said == tokenizer.decode(ids) and len(numbers.answer) == len(ids) == 6

    p, _ = P.topk(10)
    close(numbers.p, p)
    close(P.gather(1, numbers.ids), numbers.p)
    assert (numbers.ids.sort().values.diff() > 0).all(), "ten different tokens"
    close_weights(numbers, attention)
    table = numbers.tokens
    for step, i, p in zip(numbers.answer, ids, P_next):
        assert table[step["row"]][0] == i and not step["end"]
        assert step["p"] == pytest.approx(p[i].item(), rel=1e-3)
        others = [table[row][0] for row, _ in step["others"]]
        assert others == [j for j in p.topk(6).indices.tolist() if j != i][:5]
        assert [q for _, q in step["others"]] == pytest.approx(p[others].tolist(), rel=1e-3)
    for i, shown, kind in table:
        assert (shown, numbers.kinds[kind]) == named(tokenizer, i)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_of_a_long_answer_the_strongest_patches_are_kept(tokenizer, tmp_path, monkeypatch):
    model, pages = vlm(), [NINE]
    tokens, pixels = prepare_question(model, tokenizer, pages, "", 9)
    ids = [i for [i] in model.generate([tokens], [pixels], set(), 6)]
    monkeypatch.setattr(tokenizer, "stop", set())
    _, attention = expected_of(model, tokenizer, pages, "", ids[:-1])
    monkeypatch.setattr(explorer, "STRONGEST", 40)
    for whole, kept in (6, 640), (3, 40):           # with 6 steps: all of them, or a part of each
        monkeypatch.setattr(explorer, "WHOLE", whole)
        explorer.explore(model, tokenizer, pages, ["a"], "", tmp_path / "a.html", max_new_tokens=6)
        numbers = read(tmp_path / "a.html")
        assert numbers.attention["kept"] == kept and len(numbers.answer) == 6
        close_weights(numbers, attention)


def test_the_shipped_model_explains_where_it_read_an_answer(tmp_path):
    out = tmp_path / "page.html"
    done = sample(*ASK, "--explain", out)
    assert done.stdout == f"{ANSWER}\n{out}: open it in a browser\n"
    numbers = read(out)
    rows = [numbers.tokens[step["row"]] for step in numbers.answer]
    said = ["space" if c == " " else c for c in ANSWER]
    assert [text for _, text, _ in rows] == [*said, "eot id"]
    assert [step["end"] for step in numbers.answer] == [False] * len(ANSWER) + [True]
    copied = 0          # characters among the likeliest ten of the patch where the LLM looked most
    for step in range(len(ANSWER)):
        patch = numbers.weights[step, 0].argmax()
        copied += rows[step][0] in numbers.ids[patch]
    assert copied >= 8          # of 11; of all patches at most 7 in 100 have a certain letter
    [image] = numbers.images
    page = read_image(PAGE)
    assert (image["name"], image["width"], image["height"]) == (PAGE.name, *page.size)
    head, picture = image["picture"].split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")      # the smaller of them
    shown = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    assert shown.size == page.size
    assert np.abs(np.asarray(shown, float) - np.asarray(page, float)).mean() < 2


def test_patches_lie_on_the_page_where_they_come_from(tokenizer, tmp_path):
    model, page = vlm(), Image.new("RGB", (333, 517), "white")
    page.paste(ONE, (31, 47))
    explorer.explore(model, tokenizer, [page], ["a"], "", tmp_path / "a.html", max_new_tokens=1)
    [image] = read(tmp_path / "a.html").images
    head, picture = image["picture"].split(",")         # a PNG, where that is shorter
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(picture))).tobytes() == page.tobytes()
    boxes = tile_boxes(333, 517, model.config.vision)
    assert len(image["tiles"]) == len(boxes) > 1
    for tile, box in zip(image["tiles"], boxes):
        patches = [(left, top, right, bottom)
                   for top, bottom in zip(tile["ys"], tile["ys"][1:])
                   for left, right in zip(tile["xs"], tile["xs"][1:])]
        assert np.abs(patch_boxes(box, model.config.vision) - patches).max() <= 0.0051


def test_the_model_runs_once_and_stays_as_it_was(tokenizer, tmp_path):
    model, pages = vlm(), [ONE]
    fast.use(model, inference=True)
    before = [(module, dict(vars(module))) for module in model.modules()]
    first, last = model.vision.embeddings, model.llm.norm
    with (mock.patch.object(first, "forward", wraps=first.forward) as seen,
          mock.patch.object(last, "forward", wraps=last.forward) as thought):
        explorer.explore(model, tokenizer, pages, ["a"], "", tmp_path / "a.html", max_new_tokens=7)
    assert seen.call_count == 1 and thought.call_count == 7
    with mock.patch.object(explorer, "attention_row", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            explorer.explore(model, tokenizer, pages, ["a"], "", tmp_path / "b.html")
    for module, attributes in before:
        hooks = vars(module).pop("_forward_hooks"), attributes.pop("_forward_hooks")
        assert vars(module) == attributes and not any(hooks)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


# -------------------------------------------------------------------------------------------------
# Other connectors


def test_a_connector_with_few_tokens_shows_these(tokenizer, tmp_path):
    model = vlm()
    chosen = torch.tensor([7, 300, 41])
    model.connector = AlignTopK(model.connector, chosen, *spread(model.connector.W2.weight))
    explorer.explore(model, tokenizer, [ONE], ["a"], "", tmp_path / "a.html",
                     max_new_tokens=2)
    numbers = read(tmp_path / "a.html")
    assert {*numbers.ids[:, :3].flatten().tolist()} == {7, 300, 41}
    close(numbers.p[:, :3].sum(-1), torch.ones(64))
    assert not numbers.p[:, 3:].any()


@pytest.mark.parametrize("kind, latents", [("mlp", 64), ("ovis", 64), ("perceiver", 64),
                                           ("perceiver", 5)])
def test_other_connectors_show_attention_alone(tokenizer, tmp_path, kind, latents):
    model, pages = vlm(kind, n_latents=latents), [NINE]
    explorer.explore(model, tokenizer, pages, ["a"], "why?", tmp_path / "a.html", max_new_tokens=3)
    numbers = read(tmp_path / "a.html")
    ids = [numbers.tokens[step["row"]][0] for step in numbers.answer]
    _, attention = expected_of(model, tokenizer, pages, "why?", ids[:-1])
    assert numbers.patches is None
    if kind == "perceiver":         # its tokens have no place: those of a tile are added up
        attention = attention.unflatten(-1, (10, latents)).sum(-1)
        assert numbers.images[0]["tiles"][0] == {"xs": [0, 336], "ys": [0, 336]}
    close_weights(numbers, attention)


# -------------------------------------------------------------------------------------------------
# The file


def test_no_text_becomes_markup(tokenizer, tmp_path, monkeypatch):
    """Not the prompt, nor a file's name, nor a token."""
    token = tokenizer.pairs.token_bytes
    monkeypatch.setattr(tokenizer.pairs, "token_bytes", lambda i: EVIL.encode() + token(i))
    page = tmp_path / "page"
    model = vlm()
    explorer.explore(model, tokenizer, [ONE], [EVIL], EVIL + explorer.MARK, page,
                     max_new_tokens=2)
    numbers = read(page)                            # of exactly two scripts
    assert numbers.prompt == EVIL + explorer.MARK and numbers.images[0]["name"] == EVIL
    texts = [text for i, text, _ in numbers.tokens if i not in tokenizer.special.values()]
    assert texts and all("</script><script>alert(1)</script>" in text for text in texts
                         if not text.startswith("0x"))
    plain = tmp_path / "plain"
    explorer.explore(model, tokenizer, [ONE], ["a"], "b", plain, max_new_tokens=2)
    tags = [len(re.findall("<", path.read_text())) for path in (page, plain)]
    assert tags[0] == tags[1], "the template has them all"


def test_the_document_needs_nothing_else(tokenizer, tmp_path):
    text = explorer.TEMPLATE.read_text(encoding="utf-8")
    assert text.count(explorer.MARK) == 1 and not Reader(text).addresses
    assert "default-src 'none'" in text and not re.findall(r"https?:|@import|url\(", text)
    assert "innerHTML" not in text and "document.write" not in text
    assert not [line for line in text.splitlines() if len(line) > 100]


def test_a_page_of_nine_tiles_takes_less_than_3_mb(tokenizer, tmp_path):
    """32 tokens of an answer, and a page whose picture cannot be made shorter."""
    model = vlm()
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    noise[700:] = 255
    for number, page in enumerate([NINE, Image.fromarray(noise)]):
        out = tmp_path / f"{number}.html"
        explorer.explore(model, tokenizer, [page], ["a"], "read the page", out, max_new_tokens=32)
        numbers = read(out)
        assert len(numbers.images[0]["tiles"]) == 10 and len(numbers.p) == 640
        assert out.stat().st_size < (300_000, 3_000_000)[number]
        assert numbers.places is None


def test_a_page_of_7290_patches_takes_less_than_20_mb():
    """Of Llama-3.1-8B's 32 layers and 128,256 tokens, of which all are named that can be."""
    n, steps, layers = 7290, 33, 32
    ids = torch.arange(n * 10).view(n, 10)
    table = explorer.TokenTable(None)
    with mock.patch.object(explorer, "named", lambda tokenizer, i: ("·characters", "letters")):
        patches = explorer.patches_of((ids, torch.rand(n, 10)), table)
    attention = explorer.attention_of(torch.rand(steps, layers + 1, n), None,
                                      torch.rand(steps, layers + 1))
    noise = np.random.default_rng(0).integers(0, 256, (1100, 850), dtype=np.uint8)
    text = explorer.document({"patches": patches, "attention": attention, "tokens": table.rows,
                              "picture": explorer.picture(Image.fromarray(noise))})
    assert len(table.rows) == 72_900
    assert 10_000_000 < len(text.encode()) < 20_000_000


# -------------------------------------------------------------------------------------------------
# The command


def test_several_images_are_one_document_and_a_folder_one_each(folder, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("a", "b"):
        ONE.save(pages / f"{name}.png")
    ONE.save(tmp_path / "two.tiff", save_all=True, append_images=[NINE])
    ask = "--checkpoint", folder, "--max-new-tokens", 2, "--prompt", "what is NO?"
    out = tmp_path / "page.html"
    sample(*ask, "--image", pages / "a.png", tmp_path / "two.tiff", "--explain", out)
    numbers = read(out)
    names = [image["name"] for image in numbers.images]
    assert names == ["a.png", "two.tiff, page 1", "two.tiff, page 2"]
    assert len(numbers.p) == 64 + 64 + 640
    out.unlink()
    done = sample(*ask, "--image", pages, "--explain", out)
    assert done.stdout.count("open it in a browser") == 2
    for number, name in enumerate(["a.png", "b.png"], 1):
        [image] = read(tmp_path / f"page-{number}.html").images
        assert image["name"] == name
    assert not out.exists()


def test_chosen_pages_keep_their_numbers():
    assert explorer.page_names(Path("doc.pdf"), 3, "7,2-3") == [
        "doc.pdf, page 2", "doc.pdf, page 3", "doc.pdf, page 7"]
    assert explorer.page_names(Path("doc.pdf"), 1, "7") == ["doc.pdf, page 7"]
    assert explorer.page_names(Path("doc.png"), 1, None) == ["doc.png"]


@pytest.mark.parametrize("name, says", [
    ("page.jpg", "--explain writes OUT.html, with an answer, or OUT.png"),
    ("page", "--explain writes OUT.html, with an answer, or OUT.png"),
    ("gone/page.html", "there is no folder"),
])
def test_a_wrong_name_is_one_line(tmp_path, name, says):
    done = sample("--image", PAGE, "--explain", tmp_path / name, code=2)
    assert says in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_if_the_answer_fails(tokenizer, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("before")
    with mock.patch.object(explorer, "picture", side_effect=InputError("no")):
        with pytest.raises(InputError):
            explorer.explore(vlm(), tokenizer, [ONE], ["a"], "", out, max_new_tokens=1)
    assert out.read_text() == "before"
    explorer.explore(vlm(), tokenizer, [ONE], ["a"], "", out, max_new_tokens=1)
    assert read(out).images and [path.name for path in tmp_path.iterdir()] == ["page.html"]
