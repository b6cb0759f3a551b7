"""The folders of a run, and its training states.

    OUT/stage2              is complete: a model folder, its log and recipe
    OUT/stage2.partial      holds one that is not, and in step-00000100 the state of its training before that step
"""
import json
import os
import shutil
import sys
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from plumbing.weights import InputError

IN_THE_BOX = Path(__file__).parent.parent / "toy"


class States:
    """The states of a training run, FOLDER/step-00000100: written beside, then renamed; the last `keep` stay.

    Written by torch.distributed.checkpoint, each rank its part, from copies and while training goes on. PyTorch pickles
    the index inside: load your own only; what one gives to others is the exported model, which is safetensors.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int, timeout: timedelta):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.step = None            # of the newest state, written or loaded
        self.writing = None         # what is written now: a Future, and where it will be
        self.group = dist.new_group(backend="gloo", timeout=timeout)    # the writers talk while training does
        self.state()        # gives moments to every parameter: those that get no gradient belong to the state too
        for moments in optimizer.state.values():
            moments["step"].zero_()

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int, progress: dict) -> None:
        """Begin to write the state before `step`; progress: what goes with it, as JSON. Raises InputError."""
        self.finish()
        if step == self.step:
            return
        self.step, path = step, self.folder / f"step-{step:08}"
        partial = path.with_suffix(".partial")
        try:
            if dist.get_rank() == 0:
                partial.mkdir(exist_ok=True)        # the other ranks' writers make it as well
                (partial / "progress.json").write_text(json.dumps(progress))
            self.writing = dcp.async_save(self.state(), checkpoint_id=partial, process_group=self.group), path
        except OSError as error:
            raise self.not_written(error, partial) from None

    def finish(self, wait: bool = True) -> None:
        """Put what was written in its place: when that is done, or, without `wait`, if it is. Ranks may come to that at
        different steps: they exchange nothing here. Raises InputError."""
        if self.writing is None or not (wait or self.writing[0].done()):
            return
        (future, path), self.writing = self.writing, None
        partial = path.with_suffix(".partial")
        try:
            future.result()         # of the first rank: all have written
            if dist.get_rank() == 0:
                os.rename(partial, path)
                for old in sorted(self.folder.glob("step-????????"))[:-self.keep]:
                    shutil.rmtree(old)
        except (OSError, CheckpointException) as error:
            if "timed out" in str(error).lower():
                raise RuntimeError(f"{partial}: timed out") from None
            raise self.not_written(error, partial) from None

    def not_written(self, error: Exception, partial: Path) -> InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        why, free = (str(error).strip().splitlines() or [repr(error)])[-1], shutil.disk_usage(self.folder).free / 1e9
        return InputError(f"{self.folder}: the training state could not be written ({why}; {free:.1f} GB free); the "
                          f"last good one: {newest_state(self.folder) or 'none'}")

    def load(self, path: Path) -> dict:
        """Take over the state at `path`, whatever number of ranks wrote it; returns its progress. Raises InputError."""
        try:
            progress, state = json.loads((path / "progress.json").read_text()), self.state()
            dcp.load(state, checkpoint_id=path)
            set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
            self.step = progress["step"]
            return progress
        except (OSError, CheckpointException, ValueError, KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: not a complete training state of this stage ({why})") from None


def check_room(folder: Path, model: nn.Module, keep: int) -> None:
    """Raise InputError if the disk has no room for a run's states (fp32: weights, two moments) and its model."""
    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    there = sum(file.stat().st_size for file in folder.glob("step-*/*"))
    need, free = (keep + 1) * (weights + moments) + weights - there, shutil.disk_usage(folder).free
    if free < need:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, but {keep} training states, one being written, and the "
                         f"model take {need / 1e9:.1f} GB more: free some, or lower --keep")


def newest_state(folder: Path) -> Path | None:
    """The furthest complete training state in a folder."""
    return max(folder.glob("step-????????"), default=None)


def drop_states(folder: Path) -> None:
    for state in folder.glob("step-*"):
        shutil.rmtree(state)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def newest_checkpoint(out: Path = Path("out")) -> Path:
    """The highest stage of the run that was trained last, of the runs out/*/stageN."""
    stages = [path.parent for path in out.glob("*/stage[123]/config.json")]
    if not stages:
        raise InputError(f"no trained model under {out}/: run `python train.py` first, or name one with --checkpoint")
    run = max(stages, key=lambda folder: (folder / "config.json").stat().st_mtime).parent
    return max(folder for folder in stages if folder.parent == run)


def default_model() -> Path:
    """The newest trained model, or else the one in the box. Raises InputError where there is neither."""
    try:
        return newest_checkpoint()
    except InputError:
        if not (IN_THE_BOX / "stage3" / "config.json").exists():
            raise
        print("nothing is trained under out/: this is the model in the box", file=sys.stderr)
        return IN_THE_BOX / "stage3"


def stage_before(stage: int, out: Path) -> Path:
    """The folder from which a stage starts. Stage 1 of the toy: the LLM in the box, unless this run has its own."""
    folder = out / f"stage{stage - 1}"
    return folder if stage != 1 or (folder / "config.json").exists() else IN_THE_BOX / "stage0"


def origin(folder: Path) -> int | None:
    """What tells one training of the stage before from another: its log's checksum."""
    log = folder / "log.jsonl"
    return zlib.crc32(log.read_bytes()) if log.exists() else None


def recorded(folder: Path, key: str, default=None):
    """A setting of the recipe.json that a stage's folder has, if it has one."""
    try:
        return json.loads((folder / "recipe.json").read_text()).get(key, default)
    except (OSError, ValueError):
        return default


def is_complete(stage: int, out: Path) -> bool:
    """Whether a stage's folder is there, started from the stage before it, and is not being made anew."""
    folder, before = out / f"stage{stage}", origin(out / f"stage{stage - 1}")
    return ((folder / "config.json").exists() and newest_state(out / f"stage{stage}.partial") is None
            and (before is None or recorded(folder, "origin", before) == before))


def check_recipe(folder: Path, recipe: dict, otherwise: str) -> None:
    """Raise InputError if a stage was trained, or begun, with another recipe than is asked for now."""
    before = {key: recorded(folder, key, "align" if key == "connector" else value) for key, value in recipe.items()
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
        (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
        return path
    except OSError as error:
        raise InputError(f"--out {folder.parent}: {error.strerror}") from None
