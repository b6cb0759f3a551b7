"""train.py and sample.py end to end on small runs, as their users start them."""
import argparse
import json
import os
import re
import shutil
import unittest.mock
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample as sample_py
from conftest import ROOT, rows, run, sample
from model import LLAMA_PRESETS
from paper.recipes import RECIPES, recipe_for
from toy.pages import STAGE0
from train import choose_preset, learning_rate, start_of

LINE = {"stage", "step", "loss", "lr", "grad_norm", "tokens_per_s", "epoch", "bad", "images_per_s",
        "padding", "skipped", "peak_memory", "flops_per_s", "mfu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages of the toy, two steps each: the files are real, the answers are noise."""
    out = tmp_path_factory.mktemp("run")
    short = "--steps", 2, "--batch-size", 4, "--out", out
    run("train.py", "--stage", 0, *short)       # else the shipped one is taken
    done = run("train.py", *short, "--held-out", 15)
    return out, done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_modules(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


# --------------------------------------------------------------------------------------------------
# Training


def test_the_last_line_is_the_held_out_score(trained):
    out, done = trained
    *lines, last = done.stdout.splitlines()
    scores = json.loads((out / "stage3" / "held_out.json").read_text())["held-out"]
    assert last == (f"held-out: exact_match={scores['exact_match']:.3f} cer={scores['cer']:.3f} "
                    "n=15")
    kinds = tuple("invoice receipt letter form table".split())
    assert sum(line.startswith(kinds) for line in lines) == 5


def test_it_says_how_to_ask_what_it_has_trained(trained, tmp_path):
    out, done = trained
    [command] = [line for line in done.stdout.splitlines() if "sample.py" in line]
    assert command == f"ask it: python sample.py --checkpoint {out / 'stage3'} --image PAGE.png"
    page = tmp_path / "page.png"
    Image.new("RGB", (50, 50)).save(page)
    options = command.replace("PAGE.png", str(page)).split("sample.py ")[1].split()
    sample(*options, "--max-new-tokens", 2)


def test_every_stage_leaves_a_complete_folder(trained):
    out, _ = trained
    assert sorted(path.name for path in out.iterdir()) == [".lock", "stage0", "stage1", "stage2",
                                                           "stage3"]
    for stage in range(4):
        folder = out / f"stage{stage}"
        names = {path.name for path in folder.iterdir()} - {"held_out.json"}
        assert names == {"config.json", "model.safetensors", "tokenizer.model", "log.jsonl",
                         "recipe.json"}
        lines = rows(folder)
        assert [line["step"] for line in lines] == [0, 1]
        assert set(lines[0]) == LINE


def test_each_stage_trains_its_modules_and_no_others(trained):
    out, _ = trained
    states = [weights(out / f"stage{stage}") for stage in range(4)]
    # W2 starts from the LM head, W1 and the norms from scratch: stage 1's connector begins so.
    states[0]["connector.W2.weight"] = states[0]["llm.lm_head.weight"]
    states[0]["connector.W1.weight"] = states[1]["connector.W1.weight"]    # drawn anew: no change
    for stage, trainable in [(1, {"vision", "connector", "llm"}),
                             (2, {"vision", "connector", "llm"}),
                             (3, {"connector", "llm"})]:
        assert changed_modules(states[stage - 1], states[stage]) == trainable, stage


def test_a_complete_stage_is_not_trained_again_unless_its_folder_is_deleted(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    same = ["--steps", 2, "--batch-size", 4, "--held-out", 0, "--out", out]

    def written() -> list[int]:
        return [(out / f"stage{stage}" / "model.safetensors").stat().st_mtime_ns
                for stage in range(4)]

    def stayed() -> list[bool]:
        return [a == b for a, b in zip(written(), before)]

    before = written()
    assert run("train.py", *same).stdout.count("is complete") == 3 and all(stayed())
    # It is not what was asked for.
    done = run("train.py", "--steps", 3, "--batch-size", 4, "--out", out, code=2)
    assert done.stderr.splitlines() == [f"train.py: {out / 'stage1'} was trained with steps 2, not "
                                        "3: take another --out, or delete that folder"]
    assert "seed 0, not 1" in run("train.py", *same, "--seed", 1, code=2).stderr
    recipe = out / "stage1" / "recipe.json"
    kept = recipe.read_text()
    recipe.write_text("[]")
    done = run("train.py", *same, code=2)
    assert done.stderr.splitlines() == [f"train.py: {recipe}: not a JSON object"]
    recipe.write_text(kept)

    shutil.rmtree(out / "stage2")
    run("train.py", *same, "--stage", 2)
    assert stayed() == [True, True, False, True]
    run("train.py", *same)                                  # stage 3 came from the old stage 2
    assert stayed() == [True, True, False, False]
    shutil.rmtree(out / "stage0")                           # no longer needed
    run("train.py", *same)
    assert not (out / "stage0").exists()


@pytest.mark.parametrize("flags", [
    ["--steps", 0], ["--lr", -1], ["--lr", "nan"], ["--lr", "inf"], ["--batch-size", 0],
    ["--row-tokens", -2], ["--workers", -1], ["--held-out", -5], ["--preset", "llama-3.2-1b"],
    ["--preset", "low-resource", "--stage", 3], ["--lr-scale", "head=1"], ["--seed", 2 ** 63],
    ["--epochs", 2], ["--max-length", 2],
    ["--max-tiles", 2], ["--eval-data", 2],
    ["--data", ".", "--stage", 2, "--eval-data", "."],
    ["--data", ".", "--stage", 2, "--max-tiles", 101],
    ["--data", ".", "--stage", 2, "--steps", 3, "--epochs", 1]])
def test_impossible_flags_are_one_line(tmp_path, flags):
    done = run("train.py", *flags, "--out", tmp_path / "out", code=2)
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_stage_1_takes_the_shipped_llm_or_else_pretrains_it_and_stage_3_says_what_is_missing(
        trained, tmp_path):
    with_shipped = """if True:
        import pathlib, sys, train
        train.STAGE0 = pathlib.Path(sys.argv.pop(1))
        train.main()
    """
    for name, shipped in [("none", tmp_path / "nowhere"), ("one", trained[0] / "stage0")]:
        run("-c", with_shipped, shipped, "--stage", 1, "--steps", 1, "--batch-size", 2,
            "--lr", 1e-9, "--out", tmp_path / name)
        assert (tmp_path / name / "stage0" / "config.json").exists() == (name == "none")
    matrix = "llm.layers.0.mlp.up_proj.weight"
    start, after = (weights(folder) for folder in (trained[0] / "stage0", tmp_path / "one/stage1"))
    assert torch.allclose(after[matrix], start[matrix])
    done = run("train.py", "--stage", 3, "--steps", 1, "--out", tmp_path / "b", code=2)
    assert len(done.stderr.splitlines()) == 1 and "starts from stage 2" in done.stderr


def test_modules_are_chosen_and_text_alone_teaches_a_frozen_llm_nothing(trained, tmp_path):
    """Text does not pass the connector: with the LLM frozen such a step has no gradient, and is
    none."""
    (tmp_path / "stage1").symlink_to(trained[0] / "stage1")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    Image.new("RGB", (112, 112), "white").save(tmp_path / "page.png")
    lines = [json.dumps({"messages": turns, "images": images})
             for images in ([], [], ["page.png"], ["page.png"])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run("train.py", "--stage", 2, "--data", tmp_path / "train.jsonl",
        "--lr-scale", "llm=0", "vision=0.0", "--batch-size", 1, "--epochs", 1, "--max-length", 50,
        "--out", tmp_path)
    losses = [row["loss"] for row in rows(tmp_path / "stage2")]
    assert sorted(loss is None for loss in losses) == [False, False, True, True]
    done = run("train.py", "--stage", 2, "--lr-scale", "llm=0", "vision=0", "connector=0",
               "--out", tmp_path, code=2)
    assert done.stderr.splitlines() == ["train.py: --lr-scale leaves nothing to train in stage 2"]
    before, after = weights(trained[0] / "stage1"), weights(tmp_path / "stage2")
    assert changed_modules(before, after) == {"connector"}


def test_recipes_are_the_papers():
    table = {"llama-3.2-1b": [(512, 1024, 1, 1e-5), (512, 2048, 1, 5e-5), (512, 2048, 5, 5e-5)],
             "llama-3.2-3b": [(512, 1024, 1, 1e-5), (256, 2048, 1, 5e-5), (256, 2048, 5, 5e-5)],
             "llama-3.1-8b": [(512, 1024, 1, 1e-5), (256, 2048, 1, 1e-5), (256, 2048, 5, 1e-5)]}
    assert set(LLAMA_PRESETS) == {"toy", *table}
    assert set(RECIPES) == {"low-resource", "reader", *LLAMA_PRESETS}
    for preset, stages in table.items():
        for stage, row in enumerate(stages, 1):
            recipe = RECIPES[preset][stage]
            assert (recipe.batch_size, recipe.max_length, recipe.epochs, recipe.lr) == row
            # README's optimizer.
            assert (recipe.betas, recipe.weight_decay) == ((0.9, 0.95), 0.1)
            assert (recipe.warmup, recipe.final_lr, recipe.clip) == (0.05, 0, 1.0)
    small = RECIPES["low-resource"]
    assert small[1].trainable == ("connector",) and (small[1].lr, small[2].lr) == (1e-3, 1e-5)
    assert small[2].lr * small[2].lr_scale["vision"] == pytest.approx(2e-6)
    for preset in ("reader", *LLAMA_PRESETS):
        for stage in (1, 2, 3):
            frozen = RECIPES[preset][stage].trainable == ("connector", "llm")
            assert frozen == (stage == 3)


def test_a_share_on_the_command_line_counts_before_the_recipes():
    """The toy's stage 1 has a twentieth for the LLM."""
    for asked, share in ({}, 0.05), ({"vision": 0.5}, 0.05), ({"llm": 2.0}, 2.0):
        recipe = recipe_for("toy", 1, {"steps": 7, "lr": None}, asked)
        assert recipe.lr_scale["llm"] == share and (recipe.steps, recipe.lr) == (7, 1e-3)
    assert recipe_for("toy", 3, {}, {"vision": 0.1}).trainable == ("vision", "connector", "llm")
    assert recipe_for("toy", 2, {}, {"vision": 0.0}).trainable == ("connector", "llm")


def test_a_later_stage_goes_on_with_the_recipe_of_the_one_before(tmp_path):
    """Also where the LLM's size says nothing, as the reader's; else its size decides."""
    args = argparse.Namespace(llm=None, out=tmp_path, stage=3)
    assert choose_preset(args) == "toy"             # there is nothing to start from
    for shipped, preset, by_size in [("reader/stage3", "reader", "llama-3.2-1b"),
                                     ("toy/stage0", "toy", "toy")]:
        shutil.copytree(ROOT / shipped, tmp_path / "stage2", dirs_exist_ok=True)
        assert choose_preset(args) == preset
        recipe = tmp_path / "stage2" / "recipe.json"
        for damaged in ['{"preset": ["reader"]}', '{"preset": "gone"}', "{}"]:
            recipe.write_text(damaged)
            assert choose_preset(args) == by_size
        recipe.unlink()
        assert choose_preset(args) == by_size


def test_each_stage_starts_from_the_one_before(tmp_path):
    """But the reader's second from its first with larger tiles, and the toy's first from the
    shipped LLM, unless the run has one of its own."""
    def starts(preset: str, llm: Path | None = None) -> list[Path | None]:
        args = argparse.Namespace(preset=preset, llm=llm, out=tmp_path)
        return [start_of(stage, args) for stage in range(4)]

    one, two = tmp_path / "stage1", tmp_path / "stage2"
    assert starts("toy") == [None, STAGE0, one, two]
    assert starts("llama-3.2-1b", tmp_path / "llama") == [None, tmp_path / "llama", one, two]
    for _ in range(2):
        assert starts("reader") == [None, tmp_path / "stage0", tmp_path / "stage1-large", two]
        (tmp_path / "stage0").mkdir(exist_ok=True)
        (tmp_path / "stage0" / "config.json").write_text("{}")
    assert starts("toy")[1] == tmp_path / "stage0"


def test_learning_rate_warms_up_and_decays():
    """In two steps up to 2, then down to 0.2 along a cosine: 0.2 + 0.9 (1 + cos(pi / 4)) at 4."""
    recipe = replace(RECIPES["toy"][2], lr=2.0, steps=10, warmup=0.2, final_lr=0.1)
    rates = [learning_rate(step, recipe) for step in (0, 1, 2, 4, 6, 10)]
    assert rates == pytest.approx([1, 2, 2, 1.7363961, 1.1, 0.2])


# --------------------------------------------------------------------------------------------------
# Sampling


def test_a_long_grey_page_can_be_asked_about(trained, tmp_path):
    """Other modes are in test_images.py."""
    out, _ = trained
    path = tmp_path / "page.png"
    Image.new("L", (3, 4000)).save(path)
    done = sample("--checkpoint", out / "stage3", "--image", path, "--max-new-tokens", 3)
    assert f"model: {out / 'stage3'}" in done.stderr


def test_several_images_make_one_prompt_and_the_speed_is_told(trained, tmp_path):
    out, _ = trained
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path in paths:
        Image.effect_noise((100, 100), 50).save(path)
    # At this temperature nearly any token comes, and not a stop.
    options = ["--checkpoint", out / "stage3", "--max-new-tokens", 3, "--temperature", 100]
    with unittest.mock.patch.object(sample_py, "answer", wraps=sample_py.answer) as asked:
        done = sample(*options, "--image", *paths)
    [pages], [prompt] = asked.call_args.args[2:4]
    assert len(pages) == 2 and prompt == sample_py.READ
    *_, speed, cut = done.stderr.splitlines()
    assert re.fullmatch(r"first token after [\d.]+ s, then [\d.]+ tokens/s \([\d.]+ GB/s\)", speed)
    assert cut == "cut after 3 tokens (--max-new-tokens)"


def test_bad_images_are_one_line_and_status_2(trained, tmp_path):
    out, _ = trained
    Image.effect_noise((200, 200), 50).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    bomb = good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:]
    (tmp_path / "truncated.png").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name in ["truncated.png", "text.png", "empty.png", "bomb.png", "missing.png"]:
        done = sample("--checkpoint", out / "stage3", "--image", tmp_path / name, code=2)
        assert name in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_questions_file(trained, tmp_path):
    out, _ = trained
    run("-m", "toy.pages", "--draw", 5, tmp_path)
    ask = ["--checkpoint", out / "stage3", "--questions", tmp_path / "questions.jsonl"]

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    sample(*ask, "--answers", tmp_path / "a.jsonl", "--max-new-tokens", 4)
    answers = read("a.jsonl")
    assert all(isinstance(row["prediction"], str) for row in answers)
    without = [{key: row[key] for key in row if key != "prediction"} for row in answers]
    assert without == read("questions.jsonl")
    assert not (tmp_path / "a.jsonl.partial").exists()

    os.mkfifo(tmp_path / "pipe")
    done = sample(*ask, "--answers", tmp_path / "pipe", code=2)
    assert "pipe" in done.stderr and (tmp_path / "pipe").is_fifo()
    with (tmp_path / "0003-form.png").open("r+b") as damaged:       # found before any is answered
        damaged.truncate(100)
    done = sample(*ask, "--answers", tmp_path / "new" / "b.jsonl", code=2)
    assert "0003-form.png" in done.stderr and not [*tmp_path.glob("new/*")]

    ask[-1] = tmp_path / "bad.jsonl"
    for bad in ["[" * 100_000, "9" * 5000, "{", '{"image": 3, "prompt": "x"}', "[1]",
                '{"image": "0000-invoice.png"}', '{"image": "gone.png", "prompt": "x"}']:
        (tmp_path / "bad.jsonl").write_text(bad + "\n")
        done = sample(*ask, "--answers", tmp_path / "a.jsonl", code=2)
        assert "Traceback" not in done.stderr
        assert "bad.jsonl" in done.stderr or "gone.png" in done.stderr
        assert read("a.jsonl") == answers, "answers were lost"


def test_bad_checkpoints_are_one_line_and_status_2(trained, tmp_path):
    out, _ = trained
    page = tmp_path / "page.png"
    Image.new("RGB", (50, 50)).save(page)
    config = (out / "stage3" / "config.json").read_text()
    tensors = (out / "stage3" / "model.safetensors").read_bytes()
    heads = config.replace('"n_heads": 4', '"n_heads": 7')
    layers = config.replace('"n_layers": 2', '"n_layers": 3')
    for name, files in {
            "empty": {},
            "config": {"config.json": b"{"},
            "keys": {"config.json": b"{}"},
            "no weights": {"config.json": config.encode()},
            "truncated": {"config.json": config.encode(), "model.safetensors": tensors[:1000]},
            "heads": {"config.json": heads.encode(), "model.safetensors": tensors},
            "shape": {"config.json": layers.encode(), "model.safetensors": tensors},
            "no tokenizer": {"config.json": config.encode(), "model.safetensors": tensors}}.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        done = sample("--checkpoint", folder, "--image", page, code=2)
        assert str(folder) in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_tokens_that_the_connector_uses_can_be_chosen(trained, tmp_path):
    folder, page = tmp_path / "model", tmp_path / "page.png"
    shutil.copytree(trained[0] / "stage3", folder)
    Image.new("RGB", (300, 90)).save(page)
    choose = "-m", "paper.align_vocab", folder
    ask = "--checkpoint", folder, "--image", page, "--max-new-tokens", 2
    before = sample(*ask).stdout
    assert json.loads(run(*choose, 542, page, page).stdout)["pages"] == 2
    assert sample(*ask).stdout == before == sample(*ask, "--align-vocab").stdout
    run(*choose, 20, page)
    sample(*ask, "--align-vocab")
    for wrong in (0, 543):
        assert len(run(*choose, wrong, page, code=2).stderr.splitlines()) == 1
    sample("--llm", folder, "--prompt", "a", "--align-vocab", code=2)
    (folder / "align_vocab.json").write_text('{"tokens": [1, 2')
    assert "align_vocab.json: not JSON" in sample(*ask, "--align-vocab", code=2).stderr
