"""sample.py as people use it: a folder, a conversation, an explained page, the model in the box."""
import json
import re
import unittest.mock
from dataclasses import replace

import pytest
import torch
from PIL import Image

import sample as sample_py
from conftest import ROOT, randomise, run, sample, torchrun
from data import Tokenizer
from sample import answer
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, KVCache, Llama, LlamaConfig
from plumbing import runs
from toy.pages import draw, held_out_documents, write_toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy with random weights that writes ASCII. Its LM head is its own: a tied one would repeat the last word. Its
    queries are long, so that it attends to few tokens: what it says depends on the question."""
    root, preset = tmp_path_factory.mktemp("model"), ALIGNVLM_PRESETS["toy"]
    write_toy_tokenizer(root / "tokenizer.model")
    model = randomise(AlignVLM(replace(preset, llm=replace(preset.llm, tie_embeddings=False))), 1)
    with torch.no_grad():
        model.llm.lm_head.weight[127:] = model.llm.lm_head.weight[:33] = 0
        for layer in model.llm.layers:
            layer.self_attn.q_proj.weight *= 8
    model.save_pretrained(root / "toy", root / "tokenizer.model", torch.float32)
    return root / "toy"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    for i, (page, _, _) in enumerate(held_out_documents(20, 0)[:18]):
        draw(page).save(root / f"{i:02}.png")
    (root / "notes.txt").write_text("no image")
    return root


# ---------------------------------------------------------------------------------------------------------------------
# A page is read once


GQA = LlamaConfig(vocab_size=50, hidden_size=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, intermediate_size=40,
                  rope_original_length=16, tie_embeddings=False)


@pytest.mark.parametrize("config", [GQA, replace(ALIGNVLM_PRESETS["toy"].llm, tie_embeddings=False)])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_p": 0.9, "seed": 3}])
def test_after_a_prefix_the_words_are_those_of_the_whole(config, options):
    """Prompts of several lengths, down to one token, after one prefix, which serves more than once."""
    llm = randomise(Llama(config)).eval()
    torch.manual_seed(0)
    prefix, ends = torch.randint(50, (37,)), [torch.randint(50, (n,)) for n in (5, 1, 9)]
    with torch.inference_mode():
        x = llm.embed_tokens(prefix[None])
        read = KVCache(config, 1, len(prefix), "cpu", x.dtype)
        llm.hidden(x, None, read, torch.arange(len(prefix))[None])
    kept = [k.clone() for k in (*read.k, *read.v)]
    for rows in (ends, ends[1:2], ends[:1]):
        lengths = [len(row) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        whole = torch.nn.utils.rnn.pad_sequence([torch.cat([prefix, row]) for row in rows], batch_first=True)
        expected = list(llm.generate(llm.embed_tokens(whole), [37 + n for n in lengths], {7}, 20, **options))
        assert list(llm.generate(llm.embed_tokens(padded), lengths, {7}, 20, prefix=read, **options)) == expected
    assert len({token for step in expected for token in step}) > 3, "a loop of few words shows little"
    assert all(torch.equal(k, before) for k, before in zip((*read.k, *read.v), kept))


def test_logits_after_a_prefix_are_close_in_bf16():
    llm = randomise(Llama(GQA)).eval()
    tokens = torch.randint(50, (1, 30), generator=torch.Generator().manual_seed(0))
    hidden = {}
    for dtype in (torch.float32, torch.bfloat16):
        llm = llm.to(dtype)
        with torch.inference_mode():
            x = llm.embed_tokens(tokens)
            whole = llm.hidden(x)[:, 20:]
            read = KVCache(GQA, 1, 20, "cpu", dtype)
            assert read.k[0].dtype == torch.float32        # on a CPU
            llm.hidden(x[:, :20], None, read, torch.arange(20)[None])
            after = llm.hidden(x[:, 20:], None, KVCache(GQA, 1, 10, "cpu", dtype, read), torch.arange(20, 30)[None])
        hidden[dtype] = (after - whole).abs().max() / whole.abs().max()
    assert hidden[torch.float32] < 1e-5 and hidden[torch.bfloat16] < 2e-2


@pytest.mark.parametrize("names", [["00.png"], ["05.png", "00.png"]])
def test_a_conversation_answers_as_one_question_does(folder, pages, names):
    model = AlignVLM.from_pretrained(folder).eval()
    tokenizer, images = Tokenizer(folder), [Image.open(pages / name) for name in names]
    questions = ["what is TAX?", "read the page", "", "what is TAX?"]
    expected = [[text for [text] in answer(model, tokenizer, [images], [question], max_new_tokens=12)][:-1]
                for question in questions]
    assert len({texts[-1] for texts in expected}) == 3, "the questions make no difference: this would show nothing"
    with unittest.mock.patch.object(model.vision, "forward", wraps=model.vision.forward) as vision:
        conversation = sample_py.Conversation(model, tokenizer, images)
        answers = [[text for [text] in conversation.ask(question, max_new_tokens=12)] for question in questions]
    assert answers == expected and vision.call_count == 1


def test_interactive(folder, pages):
    options = "--checkpoint", folder, "--image", pages / "00.png", "--max-new-tokens", 5
    alone = [sample(*options, "--prompt", question).stdout for question in ("what is NO?", "read the page")]
    assert alone[0] != alone[1]
    for end in ("\n", "", "\nnever asked\n"):
        done = sample(*options, "--interactive", typed="what is NO?\nread the page\n" + end)
        assert done.stdout.rstrip("\n").split("> ") == ["", *alone, ""], done.stdout
        assert len(re.findall(r"read in [\d.]+ s", done.stderr)) == 1
        assert len(re.findall(r"first token after [\d.]+ s", done.stderr)) == 2
    done = sample(*options, "--interactive", typed=b"caf\xe9?".decode("utf-8", "surrogateescape") + "\nwhat is NO?\n")
    assert "lone surrogate" in done.stderr and alone[0] in done.stdout, "a bad question is no reason to stop"


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def test_each_image_of_a_folder_is_answered_by_itself(folder, pages):
    options = "--checkpoint", folder, "--max-new-tokens", 4, "--prompt", "what is NO?"
    lines = sample(*options, "--image", pages).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{i:02}.png" for i in range(18)]        # in two batches
    assert len({line.split(": ", 1)[1] for line in lines}) > 3
    for i in (0, 5, 17):
        alone = sample(*options, "--image", pages / f"{i:02}.png").stdout
        assert lines[i].split(": ", 1)[1].strip() == " / ".join(alone.removesuffix("\n").splitlines()).strip()


def test_a_bad_image_in_a_folder_is_one_line(folder, tmp_path):
    done = sample("--checkpoint", folder, "--image", tmp_path, code=2)
    assert done.stderr.splitlines()[-1] == f"sample.py: {tmp_path}: no image in this folder"
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png" in sample("--checkpoint", folder, "--image", tmp_path, code=2).stderr.splitlines()[-1]
    done = sample("--checkpoint", folder, "--image", tmp_path / "text.png", tmp_path, code=2)
    assert "a folder goes alone" in done.stderr.splitlines()[-1]


def test_words_are_chosen_from_a_folder(folder, pages, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in folder.iterdir():
        (model / file.name).symlink_to(file)
    assert json.loads(sample("--checkpoint", model, "--align-vocab", 9, "--choose-from", pages).stdout)["pages"] == 18


# ---------------------------------------------------------------------------------------------------------------------
# --explain, the model in the box, the command line


def test_explain(folder, pages, tmp_path):
    done = sample("--checkpoint", folder, "--image", pages / "00.png", "--explain", tmp_path / "words.png")
    assert str(tmp_path / "words.png") in done.stdout
    sample("--checkpoint", folder, "--image", pages / "00.png", pages / "05.png", "--explain", tmp_path / "w.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-1.png", "w-2.png", "words.png"]
    with Image.open(tmp_path / "words.png") as one, Image.open(tmp_path / "w-1.png") as same:
        assert one.size == same.size and one.tobytes() == same.tobytes()
    done = sample("--checkpoint", folder, "--image", pages / "00.png", "--explain", tmp_path / "gone" / "w.png", code=2)
    assert "gone" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_without_a_trained_model_the_one_in_the_box_is_taken(folder, pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "IN_THE_BOX", tmp_path / "box")
    ask = "--image", pages / "05.png", "--max-new-tokens", 2
    assert "python train.py" in sample(*ask, code=2).stderr
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "stage3").symlink_to(folder)
    done = sample(*ask)
    assert "the model in the box" in done.stderr and f"model: {tmp_path / 'box' / 'stage3'}" in done.stderr
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "stage3").symlink_to(folder)
    done = sample(*ask)
    assert "in the box" not in done.stderr and "model: out/mine/stage3" in done.stderr


def test_a_folder_in_bf16_answers_and_is_evaluated(tmp_path):
    """As every trained model is saved, but for the one in the box: its LLM is packed to answer."""
    box = ROOT / "toy" / "stage3"
    AlignVLM.from_pretrained(box).save_pretrained(tmp_path / "model", box / "tokenizer.model")
    page = ROOT / "assets" / "0005-invoice.png"
    assert sample("--checkpoint", tmp_path / "model", "--image", page, "--prompt", "what is NO?").stdout == "9DZC\n"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = "--checkpoint", tmp_path / "model", "--benchmark", "toy=4", "--out", out, "--noise", 0.01
        run("eval.py", *options) if processes == 1 else torchrun(processes, "eval.py", *options)
        assert json.loads((out / "scores.json").read_text())["scores"]["toy"]["exact_match"] >= 0.75


@pytest.mark.parametrize("options", [
    ["--interactive"], ["--explain", "w.png"], ["--image", "a.png", "--interactive", "--prompt", "x"],
    ["--image", "a.png", "--explain", "w.png", "--prompt", "x"], ["--image", ".", "--interactive"],
    ["--image", "a.png", "--interactive", "--explain", "w.png"], ["--llm", "folder", "--prompt", "x", "--interactive"],
    ["--questions", "q.jsonl", "--answers", "a.jsonl", "--explain", "w.png"]])
def test_impossible_combinations_say_what_to_do(options):
    done = sample(*options, code=2)
    assert done.stderr.splitlines()[-1].startswith("sample.py: error: ") and done.stdout == ""


def test_where_the_images_end():
    assert sample_py.after_images(torch.tensor([5, IMAGE, IMAGE, 6, IMAGE, 7, 8])) == 5
