"""The folders of a run: which stage is complete, what it was trained with, where a new one begins.

    OUT/stage2              is complete: a model folder, its log and recipe
    OUT/stage2.partial      holds one that is not, and its training states (plumbing/states.py)

recipe.json holds what a stage was trained with, an id of that training, and the id of the one it
started from.
"""
import json
import shutil
import uuid
from pathlib import Path

from torch import nn

from plumbing.files import write_text
from plumbing.settings import InputError, read_json
from plumbing.states import check_room, newest_state


def recorded(folder: Path, key: str, default=None):
    """A setting of the recipe.json in a stage's folder; the default where either is missing. Raises
    CheckpointError for a damaged file."""
    if not (folder / "recipe.json").exists():
        return default
    return read_json(folder / "recipe.json").get(key, default)


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, was not begun anew, and started from what is in the stage
    before's, if anything is."""
    folder = out / f"stage{stage}"
    if not (folder / "config.json").exists() or newest_state(out / f"stage{stage}.partial"):
        return False
    before = recorded(out / f"stage{stage - 1}", "id")      # None: released weights
    return before is None or recorded(folder, "start", before) == before


def check_recipe(folder: Path, recipe: dict) -> None:
    """Raise InputError if the stage in `folder` was trained, or begun, with another recipe than is
    asked for now. A value of None for "start" fits any."""
    changed = []
    for key, value in recipe.items():
        before = recorded(folder, key, value)
        if before != value and not (key == "start" and value is None):
            changed.append(f"{key} {before}, not {value}")
    if changed:
        raise InputError(f"{folder} was trained with {', '.join(changed)}: take another --out, or "
                         "delete that folder")


def begin(folder: Path, recipe: dict, model: nn.Module) -> Path | None:
    """Make a stage's folder ready to work in. Returns the training state to go on from, if there is
    one.

    Makes the folder, drops states that were not written to their end, and writes recipe.json, with
    a new id. Raises InputError where the state is of another recipe or the disk has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("step-*.partial"):
            shutil.rmtree(unfinished)
        state = newest_state(folder)
        if state:
            check_recipe(folder, recipe)
        check_room(folder, model)
        record = {**recipe, "id": uuid.uuid4().hex}
        write_text(folder / "recipe.json", json.dumps(record, indent=2) + "\n")
        return state
    except OSError as error:
        raise InputError(f"--out {folder.parent}: {error.strerror}") from None
