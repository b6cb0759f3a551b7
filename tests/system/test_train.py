"""train.py and sample.py end to end on small runs, as their users start them."""
import json
import os
import re
import shutil
import unittest.mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample as sample_py
from conftest import ROOT, alone, run, sample
from model import LLAMA_PRESETS
from train import RECIPES, learning_rate


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages of the toy, two steps each: the files are real, the answers are noise."""
    out = tmp_path_factory.mktemp("run")
    run("train.py", "--stage", 0, "--steps", 2, "--batch-size", 4, "--out", out)       # else the one in the box is taken
    done = run("train.py", "--steps", 2, "--batch-size", 4, "--held-out", 15, "--out", out)
    return out, done


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_the_last_line_is_the_held_out_score(trained):
    out, done = trained
    last = done.stdout.splitlines()[-1]
    scores = json.loads((out / "stage3" / "held_out.json").read_text())["held-out"]
    assert last == f"held-out: exact_match={scores['exact_match']:.3f} cer={scores['cer']:.3f} n=15"
    assert sum(line.startswith(tuple("invoice receipt letter form table".split())) for line in done.stdout.splitlines()) == 5


def test_every_stage_leaves_a_complete_folder(trained):
    out, _ = trained
    assert sorted(path.name for path in out.iterdir()) == ["stage0", "stage1", "stage2", "stage3"]
    for stage in range(4):
        names = {path.name for path in (out / f"stage{stage}").iterdir()} - {"held_out.json"}
        assert names == {"config.json", "model.safetensors", "tokenizer.model", "log.jsonl", "recipe.json"}
        lines = log(out / f"stage{stage}")
        assert [line["step"] for line in lines] == [0, 1]
        assert {"stage", "step", "loss", "lr", "grad_norm", "tokens_per_s", "epoch", "bad", "images_per_s", "padding", "skipped",
                "peak_memory", "flops_per_s", "mfu"} == set(lines[0])


def test_each_stage_trains_its_modules_and_no_others(trained):
    out, _ = trained
    states = [load_file(out / f"stage{stage}" / "model.safetensors") for stage in range(4)]
    for stage, trainable in [(1, {"vision", "connector", "llm"}), (2, {"vision", "connector", "llm"}), (3, {"connector", "llm"})]:
        before, after = states[stage - 1], states[stage]
        # W2 starts from the LM head, W1 and the norms from scratch, so stage 1's connector is compared with that.
        if stage == 1:
            before = {**before, "connector.W2.weight": before["llm.lm_head.weight"]}
        changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
        assert changed == trainable, stage


def test_a_complete_stage_is_not_trained_again_unless_asked(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    same = ["--steps", 2, "--batch-size", 4, "--held-out", 0, "--out", out]

    def written():
        return [(out / f"stage{stage}" / "model.safetensors").stat().st_mtime_ns for stage in range(4)]

    before = written()
    assert run("train.py", *same).stdout.count("is complete") == 3 and written() == before
    done = run("train.py", "--steps", 3, "--batch-size", 4, "--out", out, code=2)      # it is not what was asked for
    assert done.stderr.splitlines() == [f"train.py: {out / 'stage1'} was trained with steps 2, not 3: take another --out, "
                                        "or --retrain"]
    assert "look clean, not scan" in run("train.py", *same, "--look", "scan", code=2).stderr
    recipe = out / "stage1" / "recipe.json"
    kept = recipe.read_text()
    recipe.write_text(kept.replace('"look": "clean",', ""))         # from before there were looks
    assert "look clean, not scan" in run("train.py", *same, "--look", "scan", code=2).stderr
    recipe.write_text("[]")
    assert run("train.py", *same, code=2).stderr.splitlines() == [f"train.py: {recipe}: not a JSON object"]
    recipe.write_text(kept)
    run("train.py", *same, "--stage", 2, "--retrain")
    assert [a == b for a, b in zip(written(), before)] == [True, True, False, True]
    run("train.py", *same)                                  # stage 3 came from the old stage 2
    assert [a == b for a, b in zip(written(), before)] == [True, True, False, False]
    shutil.rmtree(out / "stage0")                           # no longer needed
    run("train.py", *same)
    assert not (out / "stage0").exists()


@pytest.mark.parametrize("flags", [["--steps", 0], ["--lr", -1], ["--lr", "nan"], ["--lr", "inf"], ["--batch-size", 0], ["--row-tokens", -2],
                                   ["--workers", -1], ["--held-out", -5], ["--preset", "llama-3.2-1b"],
                                   ["--lr-scale", "head=1"], ["--plan", "--preset", "low-resource", "--stage", 3],
                                   ["--plan", "--stage", 0], ["--stage", 2, "--data", "x", "--look", "hard"],
                                   ["--seed", 2 ** 63], ["--plan", "--gpus", 64, "--shard-size", 7],
                                   *([flag, 2] for flag in ("--epochs", "--max-length", "--max-tiles", "--eval-data"))])
def test_impossible_flags_are_one_line(tmp_path, flags):
    done = run("train.py", *flags, "--out", tmp_path / "out", code=2)
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_stage_1_takes_the_llm_in_the_box_or_else_pretrains_it_and_stage_3_says_what_is_missing(trained, tmp_path):
    with_box = """if True:
        import pathlib, plumbing.runs, sys, train
        plumbing.runs.IN_THE_BOX = pathlib.Path(sys.argv.pop(1))
        train.main()
    """
    for name, box in [("none", tmp_path / "nowhere"), ("one", trained[0])]:
        run("-c", with_box, box, "--stage", 1, "--steps", 1, "--batch-size", 2, "--lr", 1e-9, "--out", tmp_path / name)
        assert (tmp_path / name / "stage0" / "config.json").exists() == (name == "none")
    start = load_file(trained[0] / "stage0" / "model.safetensors")["llm.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(load_file(tmp_path / "one" / "stage1" / "model.safetensors")["llm.layers.0.mlp.up_proj.weight"], start)
    done = run("train.py", "--stage", 3, "--steps", 1, "--out", tmp_path / "b", code=2)
    assert len(done.stderr.splitlines()) == 1 and "starts from stage 2" in done.stderr


def test_modules_are_chosen_and_text_alone_teaches_a_frozen_llm_nothing(trained, tmp_path):
    """Text does not pass the connector: with the LLM frozen such a step has no gradient, and is none."""
    (tmp_path / "stage1").symlink_to(trained[0] / "stage1")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    Image.new("RGB", (112, 112), "white").save(tmp_path / "page.png")
    lines = [json.dumps({"messages": turns, "images": images}) for images in ([], [], ["page.png"], ["page.png"])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run("train.py", "--stage", 2, "--data", tmp_path / "train.jsonl", "--lr-scale", "llm=0", "vision=0.0", "--batch-size", 1,
        "--epochs", 1, "--max-length", 50, "--out", tmp_path)
    assert sorted(row["loss"] is None for row in log(tmp_path / "stage2")) == [False, False, True, True]
    done = run("train.py", "--stage", 2, "--lr-scale", "llm=0", "vision=0", "connector=0", "--out", tmp_path, code=2)
    assert done.stderr.splitlines()[-1] == "train.py: --lr-scale leaves nothing to train in stage 2"
    before, after = (load_file(folder / "model.safetensors") for folder in (trained[0] / "stage1", tmp_path / "stage2"))
    assert {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])} == {"connector"}


def test_recipes_are_the_papers():
    table = {"llama-3.2-1b": [(512, 1024, 1, 1e-5), (512, 2048, 1, 5e-5), (512, 2048, 5, 5e-5)],
             "llama-3.2-3b": [(512, 1024, 1, 1e-5), (256, 2048, 1, 5e-5), (256, 2048, 5, 5e-5)],
             "llama-3.1-8b": [(512, 1024, 1, 1e-5), (256, 2048, 1, 1e-5), (256, 2048, 5, 1e-5)]}
    assert set(RECIPES) == {"low-resource", *LLAMA_PRESETS} == {"low-resource", "toy", *table}
    for preset, rows in table.items():
        for stage, row in enumerate(rows, 1):
            recipe = RECIPES[preset][stage]
            assert (recipe.batch_size, recipe.max_length, recipe.epochs, recipe.lr) == row
    small = RECIPES["low-resource"]
    assert small[1].trainable == ("connector",) and (small[1].lr, small[2].lr) == (1e-3, 1e-5)
    assert small[2].lr * small[2].lr_scale["vision"] == pytest.approx(2e-6)
    for stages in (RECIPES[preset] for preset in LLAMA_PRESETS):
        assert all((stages[stage].trainable == ("connector", "llm")) == (stage == 3) for stage in (1, 2, 3))


def test_learning_rate_warms_up_and_decays():
    recipe = RECIPES["toy"][2]
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    peak = rates.index(max(rates))
    assert max(rates) == recipe.lr and rates[0] < rates[1] and rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.final_lr * recipe.lr, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "one pixel", "long", "rotated"])
def test_any_image_can_be_asked_about(trained, tmp_path, mode):
    out, _ = trained
    size = {"one pixel": (1, 1), "long": (3, 4000)}.get(mode, (120, 90))
    path = tmp_path / ("page.tiff" if mode == "CMYK" else "page.jpg" if mode == "rotated" else "page.png")
    image = Image.new(mode if mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK") else "RGB", size, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, **({"exif": exif} if mode == "rotated" else {}))
    done = sample("--checkpoint", out / "stage3", "--image", path, "--max-new-tokens", 3)
    assert f"model: {out / 'stage3'}" in done.stderr


def test_several_images_make_one_prompt_and_the_speed_is_told(trained, tmp_path):
    out, _ = trained
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path in paths:
        Image.effect_noise((100, 100), 50).save(path)
    options = ["--checkpoint", out / "stage3", "--max-new-tokens", 3, "--temperature", 100]    # nearly any word, not a stop
    with unittest.mock.patch.object(sample_py, "answer", wraps=sample_py.answer) as asked:
        done = sample(*options, "--image", *paths)
    [pages], [prompt] = asked.call_args.args[2:4]
    assert len(pages) == 2 and prompt == sample_py.READ
    assert re.fullmatch(r"first token after [\d.]+ s, then [\d.]+ tokens/s \([\d.]+ GB/s\)", done.stderr.splitlines()[-1])


def test_bad_images_are_one_line_and_status_2(trained, tmp_path):
    out, _ = trained
    Image.effect_noise((200, 200), 50).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    bomb = good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name in ["truncated.png", "text.png", "empty.png", "bomb.png", "missing.png"]:
        done = sample("--checkpoint", out / "stage3", "--image", tmp_path / name, code=2)
        line = done.stderr.splitlines()[-1]
        assert name in line and "Traceback" not in done.stderr and done.stdout == "", done.stderr


def test_questions_file(trained, tmp_path):
    out, _ = trained
    run("-m", "toy.pages", "--draw", 5, tmp_path)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    sample("--checkpoint", out / "stage3", "--questions", tmp_path / "questions.jsonl", "--answers", tmp_path / "a.jsonl",
           "--max-new-tokens", 4)
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in answers] == questions
    assert all(isinstance(row["prediction"], str) for row in answers) and not (tmp_path / "a.jsonl.partial").exists()
    os.mkfifo(tmp_path / "pipe")
    done = sample("--checkpoint", out / "stage3", "--questions", tmp_path / "questions.jsonl", "--answers", tmp_path / "pipe", code=2)
    assert "pipe" in done.stderr and (tmp_path / "pipe").is_fifo()
    with (tmp_path / "0003-form.png").open("r+b") as damaged:       # found before anything is answered
        damaged.truncate(100)
    done = sample("--checkpoint", out / "stage3", "--questions", tmp_path / "questions.jsonl", "--answers", tmp_path / "new" / "b.jsonl",
                  code=2)
    assert "0003-form.png" in done.stderr and not [*tmp_path.glob("new/*")]
    for bad in ["[" * 100_000, "9" * 5000, "{", '{"image": 3, "prompt": "x"}', '{"image": "0000-invoice.png"}', '{"image": "gone.png", "prompt": "x"}', "[1]"]:
        (tmp_path / "bad.jsonl").write_text(bad + "\n")
        done = sample("--checkpoint", out / "stage3", "--questions", tmp_path / "bad.jsonl", "--answers", tmp_path / "a.jsonl",
                      code=2)
        assert "Traceback" not in done.stderr and ("bad.jsonl" in done.stderr or "gone.png" in done.stderr)
        assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == answers, "answers were lost"


def test_bad_checkpoints_are_one_line_and_status_2(trained, tmp_path):
    out, _ = trained
    page = tmp_path / "page.png"
    Image.new("RGB", (50, 50)).save(page)
    weights = (out / "stage3" / "model.safetensors").read_bytes()
    config = (out / "stage3" / "config.json").read_text()
    for name, files in {"empty": {}, "config": {"config.json": b"{"}, "keys": {"config.json": b"{}"},
                        "no weights": {"config.json": config.encode()},
                        "truncated": {"config.json": config.encode(), "model.safetensors": weights[:1000]},
                        "heads": {"config.json": config.replace('"n_heads": 4', '"n_heads": 7').encode(),
                                  "model.safetensors": weights},
                        "shape": {"config.json": config.replace('"n_layers": 2', '"n_layers": 3').encode(),
                                  "model.safetensors": weights},
                        "no tokenizer": {"config.json": config.encode(), "model.safetensors": weights}}.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        done = sample("--checkpoint", folder, "--image", page, code=2)
        assert str(folder) in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_any_checkpoint_the_model_in_the_box_answers(tmp_path):
    page = tmp_path / "page.png"
    Image.new("RGB", (50, 50)).save(page)
    done = run(ROOT / "sample.py", "--image", page, "--max-new-tokens", 2, cwd=tmp_path, start=alone)
    assert "the model in the box" in done.stderr and str(ROOT / "toy" / "stage3") in done.stderr


def test_the_newest_checkpoint_is_taken_and_named(trained, tmp_path):
    out, _ = trained
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy").symlink_to(out)
    page = tmp_path / "page.png"
    Image.new("RGB", (50, 50)).save(page)
    done = run(ROOT / "sample.py", "--image", page, "--max-new-tokens", 2, cwd=tmp_path)
    assert "stage" in done.stderr.splitlines()[0]


def test_the_words_that_the_connector_uses_can_be_chosen(trained, tmp_path):
    folder, page = tmp_path / "model", tmp_path / "page.png"
    shutil.copytree(trained[0] / "stage3", folder)
    Image.new("RGB", (300, 90)).save(page)
    ask = "--checkpoint", folder, "--image", page, "--max-new-tokens", 2
    before = sample(*ask).stdout
    done = sample("--checkpoint", folder, "--align-vocab", 542, "--choose-from", page, page)
    assert json.loads(done.stdout)["pages"] == 2
    assert sample(*ask).stdout == before == sample(*ask, "--align-vocab", 542).stdout
    sample("--checkpoint", folder, "--align-vocab", 20, "--choose-from", page)
    sample(*ask, "--align-vocab", 20)
    for options in [(*ask, "--align-vocab", 21), ("--checkpoint", folder, "--align-vocab", 543, "--choose-from", page)]:
        assert len(sample(*options, code=2).stderr.splitlines()) == 2       # the model's name, and what is wrong
    for options in [(*ask, "--align-vocab", 0), ("--checkpoint", folder, "--choose-from", page),
                    ("--llm", folder, "--prompt", "a", "--align-vocab", 3)]:
        sample(*options, code=2)
    (folder / "align_vocab.json").write_text('{"words": [1, 2')
    assert "align_vocab.json: not JSON" in sample(*ask, "--align-vocab", 20, code=2).stderr
