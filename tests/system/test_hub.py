"""Names of the hub in a folder's place: the real huggingface_hub against helpers/hub_server.py."""
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import commands
from conftest import ROOT, randomise, rows, run, torchrun
from hub_server import TOKEN, Hub, Model
from plumbing.settings import InputError
from plumbing.weights import model_folder
from released import fetched, smollm2
from shipped import ANSWER, ASK, CHECKPOINT, PAGE
from small_tokenizers import small_json
from toy.pages import write_toy_tokenizer

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = "model.safetensors"
COMMIT, OLDER = "1" * 40, "2" * 40


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without models, which the commands of this test take for the real one; an empty cache,
    and a folder to work in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delitem(commands.ENV, name, raising=False)
    with Hub({}).serve() as hub:
        monkeypatch.setitem(commands.ENV, "HF_ENDPOINT", hub.url)
        monkeypatch.setitem(commands.ENV, "HF_HOME", str(tmp_path / "cache"))
        yield hub


def ask(name: str, *options, code=0):
    """sample.py --checkpoint NAME, about a page that the shipped model reads."""
    return run(ROOT / "sample.py", "--checkpoint", name, *ASK, *options, code=code,
               cwd=Path.cwd())


def complaint(name: str) -> str:
    """The last line that sample.py --llm NAME says, which is the one of its own."""
    done = run(ROOT / "sample.py", "--llm", name, "--prompt", "x", code=2, cwd=Path.cwd())
    assert "Traceback" not in done.stderr and done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("sample.py: ")]
    assert line == done.stderr.splitlines()[-1] and line.startswith(f"sample.py: {name}: ")
    return line


def test_a_released_llm_by_its_name(hub, tmp_path, monkeypatch):
    """Only what is read is fetched, once, and without a network it answers from the cache."""
    other = tmp_path / "other"
    other.write_text("of no use here")
    unused = ["README.md", "pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx",
              "original/params.json", "tokenizer_config.json", "flax_model.msgpack"]
    files = {**files_of(fetched(smollm2)), **dict.fromkeys(unused, other)}
    hub.models[SMOL] = Model(files)
    question = ["--llm", SMOL, "--prompt", "What is the capital of France?"]
    for fetches in ({"config.json", "tokenizer.json", WEIGHTS}, set()):
        done = run(ROOT / "sample.py", *question, cwd=Path.cwd())
        assert "Paris" in done.stdout and f"model: {SMOL} on " in done.stderr
        assert f"{SMOL}: {tmp_path / 'cache'}" in done.stderr and COMMIT in done.stderr
        assert hub.fetched() == fetches
        assert not [path for _, path, _ in hub.requests if path.endswith(tuple(unused))]
        hub.requests.clear()
    monkeypatch.setitem(commands.ENV, "HF_HUB_OFFLINE", "1")
    assert "Paris" in run(ROOT / "sample.py", *question, cwd=Path.cwd()).stdout
    assert hub.asked() == []


def test_our_own_model_by_its_name_and_revision(hub, tmp_path):
    """For sample.py, eval.py and paper.align_vocab."""
    hub.models["us/reader"] = Model(files_of(CHECKPOINT), {"main": COMMIT, "v1": OLDER})
    assert ask("us/reader").stdout == f"{ANSWER}\n"
    done = ask("us/reader@v1")
    assert done.stdout == f"{ANSWER}\n" and OLDER in done.stderr
    assert "/us/reader/resolve/v1/config.json" in {path for _, path, _ in hub.requests}
    snapshots = tmp_path / "cache" / "hub" / "models--us--reader" / "snapshots"
    assert {path.name for path in snapshots.iterdir()} == {COMMIT, OLDER}
    assert {path.name for path in (snapshots / COMMIT).iterdir()} == {
        "config.json", "tokenizer.model", WEIGHTS}
    run(ROOT / "eval.py", "--checkpoint", "us/reader", "--benchmark", "toy=2", cwd=Path.cwd())
    scores = json.loads(Path("out/us/reader/eval/scores.json").read_text())
    assert scores["model"] == "us/reader"
    assert "open it in a browser" in ask("us/reader", "--explain", "page.html").stdout
    Path("link.html").hardlink_to((snapshots / COMMIT / WEIGHTS).resolve())
    done = ask("us/reader", "--explain", "link.html", code=2)
    assert "would be written over" in done.stderr.splitlines()[-1]
    run("-m", "paper.align_vocab", "us/reader", 400, PAGE)      # becomes part of the copy
    # Without 138 of the tokens the last letters may be others.
    assert ask("us/reader", "--align-vocab").stdout.startswith(ANSWER[:5])


def test_a_plan_needs_no_weights(hub, tmp_path):
    """Of a name only config.json is fetched; of folders the plan is the same."""
    SiglipVisionModel(SiglipVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4)).save_pretrained(tmp_path / "eye")
    folders = {"them/eye": tmp_path / "eye", SMOL: fetched(smollm2)}
    for name, folder in folders.items():
        hub.models[name] = Model(files_of(folder))
    plans = [run("-m", "paper.plan", "--vision", vision, "--llm", llm, "--gpus", 1,
                 cwd=Path.cwd()).stdout for vision, llm in (folders, folders.values())]
    assert plans[0] == plans[1] != ""
    assert hub.fetched() == {"config.json"}


def test_a_folder_wins(hub):
    hub.models["us/reader"] = Model(files_of(CHECKPOINT))
    shutil.copytree(CHECKPOINT, "us/reader")
    assert ask("us/reader").stdout == f"{ANSWER}\n"
    assert hub.asked() == []
    # Beside it a mistyped path is not sent to anybody.
    line = complaint("us/raeder")
    assert "no such folder; us/ is one" in line and "us/raeder@main" in line
    assert hub.asked() == []
    assert "has no model of that name" in complaint("us/raeder@main")
    for path in ("./them/toy", "them/toy/", "a/b/c", "toy", "/them/toy", "../toy"):
        assert model_folder(path) == Path(path)         # a path, whatever the hub has


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    large = tmp_path / WEIGHTS              # the package keeps what it has got in pieces of 10 MB
    save_file(load_file(CHECKPOINT / WEIGHTS), large, metadata={"padding": "x" * 30_000_000})
    hub.models["us/reader"] = Model({**files_of(CHECKPOINT), WEIGHTS: large})
    hub.cuts[WEIGHTS] = [12_000_000, 12_000_000]
    assert ask("us/reader").stdout == f"{ANSWER}\n"
    first, *rest = hub.got(WEIGHTS)
    starts = [int(part.removeprefix("bytes=").removesuffix("-")) for part in rest]
    assert first is None and len(starts) == 2
    assert 0 < starts[0] <= 12_000_000 < starts[1] <= 24_000_000
    copy = tmp_path / "cache/hub/models--us--reader/snapshots" / COMMIT / WEIGHTS
    assert copy.read_bytes() == large.read_bytes()


def test_half_a_download(hub, monkeypatch):
    """Killed in the middle: what has arrived stays, and the same command fetches the rest. Without
    a network the missing file is named."""
    hub.models["us/reader"] = Model(files_of(CHECKPOINT))
    hub.pause = 600.0
    hub.open_for("config.json", "tokenizer.model")
    process = commands.start(ROOT / "sample.py", "--checkpoint", "us/reader", *ASK)
    while not hub.got(WEIGHTS):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.communicate()
    monkeypatch.setitem(commands.ENV, "HF_HUB_OFFLINE", "1")
    line = ask("us/reader", code=2).stderr.splitlines()[-1]
    assert f"{WEIGHTS} is missing in" in line and "HF_HUB_OFFLINE forbids to fetch it" in line
    monkeypatch.delitem(commands.ENV, "HF_HUB_OFFLINE")
    hub.pause = 0.0
    hub.requests.clear()
    assert ask("us/reader").stdout == f"{ANSWER}\n"
    assert hub.fetched() == {WEIGHTS}


def test_a_model_in_shards(hub, tmp_path):
    from model import AlignVLM
    model = AlignVLM.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path / "shards", CHECKPOINT / "tokenizer.model",
                          shard_bytes=1_000_000)
    hub.models["us/shards"] = Model(files_of(tmp_path / "shards"))
    assert ask("us/shards").stdout == f"{ANSWER}\n"
    assert len(hub.fetched()) > 5
    hub.requests.clear()
    assert ask("us/shards").stdout == f"{ANSWER}\n"
    # One question: which commit main is. All of that commit is there.
    assert [path for _, path, _ in hub.asked()] == ["/us/shards/resolve/main/config.json"]


# ------------------------------------------------------------------------------------------------
# What leads to nothing: one line that says so


def test_names_that_lead_to_nothing(hub, monkeypatch):
    hub.models["us/reader"] = Model(files_of(CHECKPOINT))
    hub.models["us/gated"] = Model(files_of(CHECKPOINT), gated=True)
    assert f"no such folder, and {hub.url} has no model of that name" in complaint("us/raeder")
    assert f"{hub.url} has no revision 'v9' of it" in complaint("us/reader@v9")
    terms = f"accepted its terms: do so at {hub.url}/us/gated"
    assert terms in complaint("us/gated")
    monkeypatch.setitem(commands.ENV, "HF_TOKEN", "hf_of_somebody_else")
    assert terms in complaint("us/gated")
    monkeypatch.setitem(commands.ENV, "HF_TOKEN", TOKEN)
    assert ask("us/gated").stdout == f"{ANSWER}\n"
    monkeypatch.setitem(commands.ENV, "HF_HUB_OFFLINE", "1")
    line = complaint("us/reader")
    assert "no such folder, none in the hub's cache, and HF_HUB_OFFLINE forbids" in line


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    """huggingface_hub tries for half a minute, and says so."""
    monkeypatch.setitem(commands.ENV, "HF_ENDPOINT", "http://127.0.0.1:1")
    line = complaint("us/reader")
    assert "none in the hub's cache, and http://127.0.0.1:1 does not answer (ConnectError" in line


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="no such folder; .* `pip install huggingface_hub`"):
        model_folder("us/reader")


def test_what_cannot_be_used_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    """By name: another family, SigLIP 2's NaFlex, SentencePiece's vocabulary, other formats."""
    small_json(tmp_path / "tokenizer.json", model__byte_fallback=True)
    (tmp_path / "other").write_text("{}")
    whole = {"tokenizer.json": tmp_path / "tokenizer.json", WEIGHTS: tmp_path / "other"}
    for kind, files, words in [
            ("qwen2", whole, 'model_type is "qwen2": not implemented'),
            ("siglip2", whole, "model_type is SigLIP 2's NaFlex"),
            ("llama", whole, "model.byte_fallback is true: this is SentencePiece's vocabulary"),
            ("llama", {"pytorch_model.bin": tmp_path / "other"}, "without model.safetensors"),
            (None, {"model.gguf": tmp_path / "other"}, "has no config.json of it")]:
        name = f"them/{kind}-{len(files)}"
        hub.models[name] = Model(dict(files))
        if kind:
            config = tmp_path / f"{kind}.json"
            config.write_text(json.dumps({"model_type": kind}))
            hub.models[name].files["config.json"] = config
        done = run(ROOT / "sample.py", "--llm", name, "--prompt", "x", code=2, cwd=Path.cwd())
        line = done.stderr.splitlines()[-1]
        assert line.startswith("sample.py: ") and words in line
        assert not hub.fetched() & {WEIGHTS, "pytorch_model.bin", "model.gguf"}


# ------------------------------------------------------------------------------------------------
# Training


def test_two_processes_fetch_once_and_a_run_goes_on(hub, tmp_path):
    """The second waits for the first. The same command goes on where it stopped, but not with other
    weights."""
    llm_config = TheirConfig(vocab_size=542, hidden_size=32, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    randomise(LlamaForCausalLM(llm_config)).save_pretrained(tmp_path / "llm")
    write_toy_tokenizer(tmp_path / "llm" / "tokenizer.model")
    config = SiglipVisionConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
                                intermediate_size=40, image_size=112, patch_size=14)
    randomise(SiglipVisionModel(config)).save_pretrained(tmp_path / "vision")
    hub.models["us/llm"] = Model(files_of(tmp_path / "llm"))
    hub.models["us/vision"] = Model(files_of(tmp_path / "vision"))
    hub.pause = 0.3             # so that both are there before a file is
    train = ["train.py", "--stage", 1, "--vision", "us/vision", "--llm", "us/llm@main",
             "--batch-size", 2, "--steps", 3, "--out", tmp_path / "out"]
    torchrun(2, *train, "--max-steps", 1)
    for file in ("config.json", WEIGHTS):
        assert hub.got(file) == [None, None]            # one of each model
    assert hub.got("tokenizer.model") == [None]         # SigLIP's would not be read
    recipe = json.loads((tmp_path / "out" / "stage1.partial" / "recipe.json").read_text())
    torchrun(2, *train)
    assert [row["step"] for row in rows(tmp_path / "out" / "stage1") if "loss" in row] == [0, 1, 2]
    again = json.loads((tmp_path / "out" / "stage1" / "recipe.json").read_text())
    assert {**recipe, "id": None} == {**again, "id": None}
    done = run(*train)
    assert "stage 1 is complete" in done.stdout
    shutil.copytree(tmp_path / "llm", tmp_path / "other")
    randomise(LlamaForCausalLM(llm_config), 1).save_pretrained(tmp_path / "other")
    other = [tmp_path / "other" if part == "us/llm@main" else part for part in train]
    line = run(*other, code=2).stderr.splitlines()[-1]
    assert "stage1 was trained with other weights to start from: take another --out" in line
