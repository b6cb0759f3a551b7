"""kit/vlmevalkit.py beside a stand-in for VLMEvalKit, which is too large for these tests.

The stand-in knows the few names that the file takes from the kit, and hands over messages in the
form that ms-vlmeval 0.0.20 has. That the kit itself takes the class was seen by hand:
paper/README.md has the command and what came of it.
"""
import importlib
import sys
import types

import pytest

from conftest import alone, sample
from plumbing.settings import InputError
from sets import PAGES
from shipped import ANSWER, CHECKPOINT, PAGE, PROMPT


class BaseModel:
    """What the kit's own class does with a message before it calls generate_inner, as far as here
    matters."""

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all(isinstance(part, dict) for part in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def kit(monkeypatch):
    """kit.vlmevalkit, and what its runner was called with."""
    calls = []
    modules = {
        "vlmeval": types.ModuleType("vlmeval"),
        "vlmeval.run": types.SimpleNamespace(main=lambda: calls.append(list(sys.argv))),
        "vlmeval.config": types.SimpleNamespace(supported_VLM={"another": None}),
        "vlmeval.vlm": types.ModuleType("vlmeval.vlm"),
        "vlmeval.vlm.base": types.SimpleNamespace(BaseModel=BaseModel),
    }
    modules["vlmeval"].run = modules["vlmeval.run"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "kit.vlmevalkit", raising=False)
    module = importlib.import_module("kit.vlmevalkit")
    yield module, calls
    sys.modules.pop("kit.vlmevalkit")


def image(path) -> dict:
    return {"type": "image", "value": str(path)}


def text(value: str) -> dict:
    return {"type": "text", "value": value}


def test_answers_are_those_of_sample_py(kit, tmp_path):
    """One image and two; a text in two parts is a text of two lines."""
    paths = []
    for i, (page, *_) in enumerate(PAGES[:2]):
        paths.append(tmp_path / f"{i}.png")
        page.save(paths[i])
    model = kit[0].KitModel(CHECKPOINT, max_new_tokens=12)
    assert model.generate([image(PAGE), text(PROMPT)], "DocVQA_VAL") == ANSWER
    ask = "--max-new-tokens", 12, "--prompt"
    prompt = PAGES[1][2]
    said = sample("--image", *paths, *ask, prompt).stdout
    assert model.generate([image(paths[0]), image(paths[1]), text(prompt)]) + "\n" == said
    said = sample("--image", paths[1], *ask, f"{prompt}\nBriefly.").stdout
    assert model.generate([image(paths[1]), text(prompt), text("Briefly.")]) + "\n" == said


def test_what_it_cannot_read_is_named(kit, tmp_path):
    model = kit[0].KitModel(CHECKPOINT)
    with pytest.raises(InputError, match="Video-MME: a question with a video"):
        model.generate([{"type": "video", "value": "a.mp4"}, text("?")], "Video-MME")
    with pytest.raises(InputError, match="a.png: no such file"):
        model.generate([image(tmp_path / "a.png"), text("?")])


def test_the_runner_gets_its_flags_and_the_model(kit, monkeypatch):
    module, calls = kit
    monkeypatch.setattr(sys, "argv", ["vlmevalkit.py", "--data", "DocVQA_VAL", "ChartQA_TEST",
                                      "--work-dir", "w", "--reuse"])
    module.main()
    assert calls == [["vlmevalkit.py", "--model", "AlignVLM", "--data", "DocVQA_VAL",
                      "ChartQA_TEST", "--work-dir", "w", "--reuse"]]
    models = sys.modules["vlmeval.config"].supported_VLM
    assert set(models) == {"another", "AlignVLM"}
    assert isinstance(models["AlignVLM"](), module.KitModel)


def test_without_the_kit_its_command_is_said(tmp_path):
    (tmp_path / "vlmeval.py").write_text("raise ImportError('no vlmeval')")
    program = (f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); "
               "runpy.run_module('kit.vlmevalkit', run_name='__main__')")
    process = alone("-c", program, "--data", "DocVQA_VAL")
    _, errors = process.communicate()
    assert process.returncode == 2
    said = "no vlmeval: VLMEvalKit needs `pip install ms-vlmeval==0.0.20`"
    assert errors == f"vlmevalkit.py: {said}\n"
