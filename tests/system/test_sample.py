"""sample.py as people use it: a folder, a conversation, an explained page, the shipped model."""
import json
import re
import unittest.mock
from dataclasses import replace

import pytest
import torch
from PIL import Image

import sample as sample_py
from conftest import randomise, run, sample, torchrun
from data import TextError, Tokenizer
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, Llama, LlamaConfig
from plumbing import fast
from sample import answer
from shipped import ANSWER, ASK, CHECKPOINT, PAGE
from toy.pages import draw, held_out_documents, write_toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy with random weights that writes ASCII.

    Its LM head is its own: a tied one would repeat the last token. Its queries are long, so that it
    attends to few tokens: what it says depends on the question.
    """
    root = tmp_path_factory.mktemp("model")
    write_toy_tokenizer(root / "tokenizer.model")
    preset = ALIGNVLM_PRESETS["toy"]
    config = replace(preset, llm=replace(preset.llm, tie_embeddings=False))
    model = randomise(AlignVLM(config), 1)
    with torch.no_grad():
        model.llm.lm_head.weight[127:] = 0
        model.llm.lm_head.weight[:33] = 0
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


# -------------------------------------------------------------------------------------------------
# A page is read once


GQA = LlamaConfig(vocab_size=50, hidden_size=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8,
                  intermediate_size=40, rope_original_length=16, tie_embeddings=False)


def test_logits_after_a_prefix_are_close_in_bf16():
    llm = randomise(Llama(GQA)).eval()
    fast.use(llm)
    tokens = torch.randint(50, (1, 30), generator=torch.Generator().manual_seed(0))
    error = {}
    for dtype in (torch.float32, torch.bfloat16):
        llm = llm.to(dtype)
        with torch.inference_mode():
            x = llm.embed_tokens(tokens)
            whole = llm.hidden(x)[:, 20:]
            read = llm.new_cache(1, 20)
            assert read.k[0].dtype == torch.float32        # on a CPU
            llm.hidden(x[:, :20], cache=read)
            cache = llm.new_cache(1, 10, read)
            after = llm.hidden(x[:, 20:], None, cache, torch.arange(20, 30)[None])
        error[dtype] = (after - whole).abs().max() / whole.abs().max()
    assert error[torch.float32] < 1e-5 and error[torch.bfloat16] < 2e-2


@pytest.mark.parametrize("names", [["00.png"], ["05.png", "00.png"]])
def test_a_conversation_answers_as_one_question_does(folder, pages, names):
    model = AlignVLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer(folder)
    images = [Image.open(pages / name) for name in names]
    questions = ["what is TAX?", "read the page", "", "what is TAX?"]
    expected = []
    for question in questions:
        texts = answer(model, tokenizer, [images], [question], max_new_tokens=12)
        expected.append([text for [text] in texts][:-1])
    different = {texts[-1] for texts in expected}
    assert len(different) == 3, "the questions make no difference: this would show nothing"
    read = unittest.mock.patch.object(model.vision, "forward", wraps=model.vision.forward)
    with read as vision:
        conversation = sample_py.Conversation(model, tokenizer, images)
        answers = [[text for [text] in conversation.ask(question, max_new_tokens=12)]
                   for question in questions]
    assert answers == expected and vision.call_count == 1


def test_each_batch_draws_anew(folder, pages, tmp_path, monkeypatch):
    """The same question twice, in batches of one: at a temperature two answers."""
    monkeypatch.setattr(sample_py, "BATCH", 1)
    model, tokenizer = AlignVLM.from_pretrained(folder).eval(), Tokenizer(folder)
    files, prompts = 2 * [pages / "00.png"], 2 * ["what is TAX?"]
    options = {"max_tiles": None, "max_new_tokens": 20, "temperature": 5.0}
    first, second = sample_py.answer_each(model, tokenizer, files, prompts, seed=3, **options)
    assert first != second
    again = sample_py.answer_each(model, tokenizer, files, prompts, seed=3, **options)
    assert list(again) == [first, second]


@pytest.mark.parametrize("longest, is_cut", [(3, False), (4, True)])
def test_answers_of_several_that_were_cut(folder, pages, monkeypatch, capsys, longest, is_cut):
    """Said once, where the longest of a batch has as many tokens as it may have."""
    lengths = iter([longest, 2, 1])             # of each batch's longest answer

    def answer(_, __, images, prompts, *___, **____):
        list(images)
        for n in range(next(lengths) + 1):      # after each token, and once more at the end
            yield [(n + 1) * "a"] + ["a"] * (len(prompts) - 1)

    monkeypatch.setattr(sample_py, "answer", answer)
    monkeypatch.setattr(sample_py, "BATCH", 2)
    model, files = AlignVLM.from_pretrained(folder), 5 * [pages / "00.png"]
    options = {"max_tiles": None, "seed": 0, "max_new_tokens": 4}
    assert len(list(sample_py.answer_each(model, None, files, 5 * ["?"], **options))) == 5
    said = "cut after 4 tokens: one answer or several (--max-new-tokens)\n"
    assert capsys.readouterr().err.count(said) == is_cut


def test_a_folder_whose_pages_lose_small_type(folder, tmp_path):
    """One line for all of them, after the answers. An image that is asked about twice is one, and
    its name moves no cursor."""
    Image.new("RGB", (2000, 1500)).save(tmp_path / "b\x1b[31m.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    rows = [{"image": name, "prompt": "?"} for name in ("a.png", "b\x1b[31m.png", "b\x1b[31m.png")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for asked in (["--image", tmp_path],
                  ["--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl"]):
        done = sample("--checkpoint", folder, *asked, "--max-new-tokens", 1)
        [line] = [line for line in done.stderr.split("\n") if "small type" in line]
        assert "1 of 2 images lose small type, first " in line and "\x1b" not in line


def test_a_phones_pictures_in_a_folder_are_said_to_be_left_out(folder, tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    for name in ("b.HEIC", "._b.HEIC"):         # the second is a Mac's, beside it
        (tmp_path / name).write_bytes(b"")
    done = sample("--checkpoint", folder, "--image", tmp_path, "--max-new-tokens", 1)
    said = "left out, since Pillow cannot read them: 1, first b.HEIC (save as JPEG)\n"
    assert said in done.stderr
    assert done.stdout.startswith("a.png: ") and len(done.stdout.splitlines()) == 1


def test_a_flag_that_is_given_twice_has_both(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", "--image", "a", "b", "--image", "c"])
    assert sample_py.parse_args().image == ["a", "b", "c"]


def test_a_question_that_is_too_long_is_no_question(folder, pages, monkeypatch):
    model, tokenizer = AlignVLM.from_pretrained(folder).eval(), Tokenizer(folder)
    conversation = sample_py.Conversation(model, tokenizer, [Image.open(pages / "00.png")])
    said = [*conversation.ask("X" * 30, max_new_tokens=2)]
    monkeypatch.setattr(sample_py, "MAX_QUESTION", 30)      # with what ends the turn it has more
    assert said and [*conversation.ask("X", max_new_tokens=2)]
    with pytest.raises(TextError, match=r"a question of \d\d tokens: at most 30"):
        next(conversation.ask("X" * 30, max_new_tokens=2))


def test_interactive_without_an_input(folder, pages):
    """As cron starts it."""
    code = ("import runpy, sys; sys.stdin = None; "
            "runpy.run_path('sample.py', run_name='__main__')")
    done = run("-c", code, "--checkpoint", folder, "--image", pages / "00.png", "--interactive",
               code=2)
    assert done.stderr.splitlines()[-1] == ("sample.py: --interactive: there is no input to read "
                                            "questions from")


def test_a_file_name_moves_no_cursor(folder):
    name = "no\nsuch\x1b[31m\udcff.png"
    line = run("sample.py", "--checkpoint", folder, "--image", name, code=2).stderr.splitlines()[-1]
    assert line == r"sample.py: no\nsuch\x1b[31m\udcff.png: no such file"


def test_interactive(folder, pages):
    options = "--checkpoint", folder, "--image", pages / "00.png", "--max-new-tokens", 5
    alone = [sample(*options, "--prompt", question).stdout
             for question in ("what is NO?", "read the page")]
    assert alone[0] != alone[1]
    for end in ("\n", "", "\nnever asked\n"):
        done = sample(*options, "--interactive", typed="what is NO?\nread the page\n" + end)
        assert done.stdout.rstrip("\n").split("> ") == ["", *alone, ""], done.stdout
        assert len(re.findall(r"read in [\d.]+ s", done.stderr)) == 1
        assert len(re.findall(r"first token after [\d.]+ s", done.stderr)) == 2
    bad = b"caf\xe9?".decode("utf-8", "surrogateescape")
    done = sample(*options, "--interactive", typed=f"{bad}\nwhat is NO?\n")
    assert "lone surrogate" in done.stderr
    assert alone[0] in done.stdout, "a bad question is no reason to stop"


# -------------------------------------------------------------------------------------------------
# A folder


def test_each_image_of_a_folder_is_answered_by_itself(folder, pages):
    options = "--checkpoint", folder, "--max-new-tokens", 4, "--prompt", "what is NO?"
    lines = sample(*options, "--image", pages).stdout.splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names == [f"{i:02}.png" for i in range(18)]          # in two batches
    answers = [line.split(": ", 1)[1].strip() for line in lines]
    assert len(set(answers)) > 3
    for i in (0, 5, 17):
        alone = sample(*options, "--image", pages / f"{i:02}.png").stdout
        assert answers[i] == " / ".join(alone.removesuffix("\n").splitlines()).strip()


def test_a_bad_image_at_a_folders_end_is_found_before_the_first_answer(folder, tmp_path):
    for i in range(sample_py.BATCH):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "99.png").write_text("not an image")
    done = sample("--checkpoint", folder, "--image", tmp_path, "--max-new-tokens", 1, code=2)
    assert "99.png" in done.stderr.splitlines()[-1] and done.stdout == ""


def test_a_bad_image_in_a_folder_is_one_line(folder, tmp_path):
    done = sample("--checkpoint", folder, "--image", tmp_path, code=2)
    assert done.stderr.splitlines()[-1] == f"sample.py: {tmp_path}: no image in this folder"
    (tmp_path / "text.png").write_text("not an image")
    done = sample("--checkpoint", folder, "--image", tmp_path, code=2)
    assert "text.png" in done.stderr.splitlines()[-1]
    done = sample("--checkpoint", folder, "--image", tmp_path / "text.png", tmp_path, code=2)
    assert "a folder goes alone" in done.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------------
# --explain, the shipped model, the command line


def test_explain(folder, pages, tmp_path):
    one, two = pages / "00.png", pages / "05.png"
    ask = "--checkpoint", folder, "--image"
    done = sample(*ask, one, "--explain", tmp_path / "tokens.png")
    assert str(tmp_path / "tokens.png") in done.stdout
    sample(*ask, one, two, "--explain", tmp_path / "t.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["t-1.png", "t-2.png", "tokens.png"]
    with Image.open(tmp_path / "tokens.png") as drawn, Image.open(tmp_path / "t-1.png") as same:
        assert drawn.size == same.size and drawn.tobytes() == same.tobytes()
    done = sample(*ask, one, "--explain", tmp_path / "gone" / "t.png", code=2)
    assert "gone" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_without_checkpoint_the_shipped_model_answers(folder, pages, tmp_path, monkeypatch):
    """Whatever has been trained here."""
    assert sample_py.SHIPPED == CHECKPOINT
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "reader" / "stage3"
    monkeypatch.setattr(sample_py, "SHIPPED", shipped)
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "stage3").symlink_to(folder)
    ask = "--image", pages / "05.png", "--max-new-tokens", 2
    [line] = sample(*ask, code=2).stderr.splitlines()
    assert line.startswith(f"sample.py: {shipped}")
    shipped.parent.mkdir()
    shipped.symlink_to(folder)
    assert sample(*ask).stderr.startswith(f"model: {shipped} on cpu\n")


def test_a_page_whose_small_type_is_lost_is_told(folder, tmp_path):
    """The toy's tiles have 112 pixels: a page of 336 fits nine, half of one of 560 is lost."""
    for side, few, said in [(336, 9, None), (560, 9, "9 tiles of 112, 36% of it"),
                            (130, 1, None), (200, 1, "1 tile of 112, 31% of it")]:
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        lines = sample("--checkpoint", folder, "--image", tmp_path / "a.png", "--max-tiles", few,
                       "--max-new-tokens", 1).stderr.splitlines()
        told = [line for line in lines if "small type is lost" in line]
        assert len(told) == (said is not None)
        assert said is None or said in told[0] and f"{side} x {side} pixels" in told[0]
    sides = [100, 560, 400]
    for side in sides:
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    lines = sample("--checkpoint", folder, "--image", *[tmp_path / f"{side}.png" for side in sides],
                   "--max-tiles", 1, "--max-new-tokens", 1).stderr.splitlines()
    n = AlignVLM.from_pretrained(folder).config.tile_tokens
    assert f"3 pages together: 3 tiles, {3 * n:,} visual tokens" in lines
    [told] = [line for line in lines if "small type is lost" in line]
    assert "a page of 560 x 560 pixels becomes 1 tile of 112, 4% of it" in told


def test_the_shipped_model_reads_answers_and_is_evaluated(tmp_path):
    """In bf16, as trained models are saved: on one process and two."""
    assert sample(*ASK).stdout == f"{ANSWER}\n"
    assert sample("--image", PAGE).stdout.splitlines()[-1] == ANSWER
    measured = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["eval.py", "--benchmark", "reader-pages", "--limit", 4, "--out", out,
                   "--noise", 0.01]
        if processes == 1:
            run(*command)
        else:
            torchrun(processes, *command)
        scores = json.loads((out / "scores.json").read_text())["scores"]["reader-pages"]
        measured.append((scores["exact_match"], scores["character_errors"]))
    assert measured[0] == measured[1] and measured[0][1] < 0.4      # of a page not read it is 0.9


@pytest.mark.parametrize("options", [
    ["--interactive"],
    ["--explain", "t.png"],
    ["--image", "a.png", "--interactive", "--prompt", "x"],
    ["--image", "a.png", "--explain", "t.png", "--prompt", "x"],
    ["--image", ".", "--interactive"],
    ["--image", "a.png", "--interactive", "--explain", "t.png"],
    ["--llm", "folder", "--prompt", "x", "--interactive"],
    ["--llm", "folder", "--prompt", "x", "--align-vocab"],
    ["--questions", "q.jsonl", "--answers", "a.jsonl", "--explain", "t.png"]])
def test_impossible_combinations_say_what_to_do(options):
    done = sample(*options, code=2)
    assert done.stderr.splitlines()[-1].startswith("sample.py: error: ") and done.stdout == ""


def test_a_file_without_a_question_leaves_earlier_answers_alone(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    (tmp_path / "a.jsonl").write_text("earlier")
    done = sample("--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl", code=2)
    assert "not a single question" in done.stderr
    assert (tmp_path / "a.jsonl").read_text() == "earlier"


def test_earlier_answers_stay_until_all_new_ones_are_there(tmp_path, monkeypatch):
    """A kill amid the answers leaves the file as it was."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "prompt": "?"}\n' * 2)
    (tmp_path / "a.jsonl").write_text("earlier")

    def answer_each(*_, **options):
        yield "new"
        if options["is_killed"]:
            raise KeyboardInterrupt
        yield "new"

    monkeypatch.setattr(sample_py, "answer_each", answer_each)
    files = None, None, tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_py.answer_questions(*files, is_killed=True)
    assert (tmp_path / "a.jsonl").read_text() == "earlier"
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "a.jsonl")
    sample_py.answer_questions(*files[:3], link, is_killed=False)
    assert link.is_symlink()
    assert [json.loads(line)["prediction"] for line in (tmp_path / "a.jsonl").open()] == ["new"] * 2


def test_the_flags_of_sampling_are_the_samplings(folder, pages):
    ask = "--checkpoint", folder, "--image", pages / "05.png", "--max-new-tokens", 8
    greedy, *drawn = [sample(*ask, *flags).stdout for flags in (
        [], ["--temperature", 3], ["--temperature", 3], ["--temperature", 3, "--seed", 1],
        ["--temperature", 3, "--top-p", 1e-9])]
    assert drawn[0] == drawn[1] and len({greedy, drawn[0], drawn[2]}) == 3 and drawn[3] == greedy


def test_speed_is_that_of_the_tokens_after_the_first(capsys):
    """Three tokens in a second and a half, for each of which the layers and the head are read."""
    llm = Llama(GQA)
    sample_py.print_speed(llm, 10.0, [10.25, 10.75, 11.25, 11.75])
    n = sum(p.numel() for p in llm.parameters()) - llm.embed_tokens.weight.numel() - 24   # the norm
    assert capsys.readouterr().err == (f"first token after 0.25 s, then 2.0 tokens/s "
                                       f"({2 * 4 * n / 1e9:.1f} GB/s)\n")
    sample_py.print_speed(llm, 10.0, [10.25])
    sample_py.print_speed(llm, 10.0, [])
    assert capsys.readouterr().err == "first token after 0.25 s\n"


@pytest.mark.parametrize("piece, n, is_said", [
    ("or ", 86, True), ("or ", 84, False), ("\u00e9", 256, True), ("the end. ", 3, False)])
def test_an_answer_that_was_ended_for_going_in_circles_says_so(capsys, piece, n, is_said):
    """A character a token, as the reader writes; the whole answer comes twice, as from `answer`."""
    text = "read: " + piece * n
    for again in ([], [[text]]):
        times = sample_py.show(iter([[text[:i]] for i in range(1, len(text) + 1)] + again))
        printed = capsys.readouterr()
        assert printed.out == text + "\n" and len(times) == len(text) + len(again)
        assert ("ended: the last 256 tokens repeat" in printed.err) == is_said


def test_where_the_images_end():
    assert sample_py.after_images(torch.tensor([5, IMAGE, IMAGE, 6, IMAGE, 7, 8])) == 5
