"""The folders of a run: which stage is complete, what it was trained with, where a new one begins.

    OUT/stage2              is complete: a model folder, its log and recipe
    OUT/stage2.partial      holds one that is not, and its training states (plumbing/states.py)
    toy/                    the model in the box: what the toy starts from, and what reads where nothing was trained
"""
import json
import shutil
import sys
import zlib
from pathlib import Path

from torch import nn

from plumbing.states import check_room, newest_state
from plumbing.settings import InputError, read_json

IN_THE_BOX = Path(__file__).parent.parent / "toy"


def stage_before(stage: int, out: Path) -> Path:
    """The folder from which a stage starts. Stage 1 of the toy: the LLM in the box, unless this run has its own."""
    folder = out / f"stage{stage - 1}"
    return folder if stage != 1 or (folder / "config.json").exists() else IN_THE_BOX / "stage0"


def origin(folder: Path) -> int | None:
    """What tells one training of the stage before from another: its log's checksum."""
    log = folder / "log.jsonl"
    return zlib.crc32(log.read_bytes()) if log.exists() else None


def recorded(folder: Path, key: str, default=None):
    """A setting of the recipe.json that a stage's folder has, if it has one. Raises InputError for a damaged file."""
    if not (folder / "recipe.json").exists():
        return default
    return read_json(folder / "recipe.json").get(key, default)


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, started from the stage before it, and is not being made anew."""
    folder, before = out / f"stage{stage}", origin(out / f"stage{stage - 1}")
    return ((folder / "config.json").exists() and newest_state(out / f"stage{stage}.partial") is None
            and (before is None or recorded(folder, "origin", before) == before))


def check_recipe(folder: Path, recipe: dict, otherwise: str) -> None:
    """Raise InputError if a stage was trained, or begun, with another recipe than is asked for now."""
    first = {"connector": "align", "look": "clean"}         # before there was a choice
    before = {key: recorded(folder, key, first.get(key, value)) for key, value in recipe.items()
              if key != "launch" and (key != "origin" or value is not None)}
    changed = [f"{key} {old}, not {recipe[key]}" for key, old in before.items() if old != recipe[key]]
    if changed:
        raise InputError(f"{folder} was trained with {', '.join(changed)}: take another --out, or {otherwise}")


def begin(folder: Path, record: dict, model: nn.Module, resume: str, keep: int) -> Path | None:
    """Make the stage's folder ready to work in. Returns the state to go on from, if any. Raises InputError."""
    try:
        if resume not in ("auto", "never"):
            path = Path(resume)
            if not (path / "progress.json").is_file():
                raise InputError(f"--resume {path}: no such training state")
            if path.parent.resolve() != folder.resolve() and newest_state(folder):
                raise InputError(f"--resume {path}: {folder} has states of its own; take another --out")
        folder.mkdir(parents=True, exist_ok=True)
        for state in folder.glob("step-*"):
            later = resume not in ("auto", "never") and state.name > path.name      # of the run that is left now
            if resume == "never" or state.suffix == ".partial" or later:
                shutil.rmtree(state)
        if resume == "never":
            path = None
            (folder / "log.jsonl").unlink(missing_ok=True)
        elif resume == "auto":
            path = newest_state(folder)
            if path:
                check_recipe(folder, record, "--resume never")
        check_room(folder, model, keep)
        (folder / "recipe.json.partial").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "recipe.json.partial").rename(folder / "recipe.json")
        return path
    except OSError as error:
        raise InputError(f"--out {folder.parent}: {error.strerror}") from None
