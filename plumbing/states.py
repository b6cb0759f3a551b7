"""Training states: what a run that was interrupted goes on from, on any number of ranks."""
import json
import os
import shutil
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from plumbing.files import to_disk
from plumbing.processes import LOST
from plumbing.settings import InputError

KEPT = 2        # states of a run; while one is being written there is a third
STATE = "step-" + 8 * "[0-9]"       # what a state is called; what else is there is the user's


class States:
    """The states of a training run, FOLDER/step-00000100: written beside, then renamed; the last
    two stay.

    Written by torch.distributed.checkpoint, each rank its part, from copies and while training goes
    on. PyTorch pickles the index inside: load your own only. What one gives to others is the
    exported model, which is safetensors.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
                 timeout: timedelta):
        """Gives moments to every parameter of the optimizer: those that never get a gradient belong
        to the state too. Every rank calls this, as all methods."""
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.step: int | None = None        # of the newest state, written or loaded
        # What is on its way, the stager that holds the copies, and its place.
        self.writing: tuple[Future, DefaultStager, Path] | None = None
        # The writers talk while training does.
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.state()                        # makes the moments, in a step that counts as one
        for moments in optimizer.state.values():
            moments["step"].zero_()

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int, progress: dict) -> None:
        """Begin to write the state before `step`; progress: what goes with it, as JSON. Raises
        InputError."""
        self.finish()
        if step == self.step:
            return
        self.step = step
        path = self.folder / f"step-{step:08}"
        partial = path.with_suffix(".partial")
        try:
            if dist.get_rank() == 0:
                partial.mkdir(exist_ok=True)        # the other ranks' writers make it as well
                (partial / "progress.json").write_text(json.dumps(progress))
                to_disk(partial / "progress.json")      # as the writers do with their files
            # Nothing is to be copied ahead, all is in copies: the thread that does it would open
            # a context on GPU 0 from every rank.
            writer = FileSystemWriter(partial, per_thread_copy_ahead=0)
            stager = DefaultStager(StagingOptions(False, False, False, False))
            future = dcp.async_save(self.state(), storage_writer=writer, async_stager=stager,
                                    process_group=self.group)
            self.writing = future, stager, path
        except OSError as error:
            raise self.not_written(error, partial) from None

    def finish(self, wait: bool = True) -> None:
        """Put what was written in its place, and drop the oldest: when that is done, or, without
        `wait`, if it is. Ranks may come to that at different steps: they exchange nothing here.
        Raises InputError."""
        if self.writing is None:
            return
        future, stager, path = self.writing
        if not wait and not future.done():
            return
        self.writing = None
        partial = path.with_suffix(".partial")
        try:
            future.result()         # of the first rank: all have written
            stager.close()          # lets go of the copies, which hold each other in a circle
            if dist.get_rank() == 0:
                os.rename(partial, path)
                for old in sorted(self.folder.glob(STATE))[:-KEPT]:
                    # If another program has it open, on NFS, it goes after the next state.
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, CheckpointException) as error:
            if "timed out" in str(error).lower():
                raise RuntimeError(f"{partial}: timed out") from None
            raise self.not_written(error, partial) from None

    def not_written(self, error: Exception, partial: Path) -> InputError:
        """The error to raise where a state could not be written. What there is of it goes."""
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        lines = str(error).strip().splitlines() or [repr(error)]
        free = shutil.disk_usage(self.folder).free / 1e9
        good = newest_state(self.folder) or "none"
        return InputError(f"{self.folder}: the training state could not be written ({lines[-1]}; "
                          f"{free:.1f} GB free); the last good one: {good}")

    def load(self, path: Path) -> dict:
        """Take over the state at `path`, whatever number of ranks wrote it, into model and
        optimizer. Returns the progress that goes with it. Raises InputError."""
        try:
            progress = json.loads((path / "progress.json").read_text())
            state = self.state()
            dcp.load(state, checkpoint_id=path)
            set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
            self.step = progress["step"]
            return progress
        except (OSError, CheckpointException, ValueError, KeyError, TypeError,
                RuntimeError) as error:
            raise self.not_read(error, path) from None

    def not_read(self, error: BaseException, path: Path) -> Exception:
        """The error to raise where a state could not be read. It need not be the state's fault."""
        reasons = [error]
        if isinstance(error, CheckpointException):
            reasons = [reason for reason, _ in error.failures.values()]     # by rank
        for reason in reasons:
            said = str(reason)
            is_lost = LOST.search(said) and not isinstance(reason, OSError)
            if is_lost or isinstance(reason, torch.OutOfMemoryError) or "allocate memory" in said:
                return RuntimeError(said)       # of a lost rank, name_stalled_rank says which
        why = " ".join(str(reasons[0]).split())[-300:] or repr(reasons[0])
        hint = ""
        if len(list(self.folder.glob(STATE))) > 1:
            hint = ": if it is damaged, delete it, and the run goes on from the one before"
        return InputError(f"{path}: not a complete training state of this stage ({why}){hint}")


def check_room(folder: Path, model: nn.Module) -> None:
    """Raise InputError if the disk has no room for a run's states (fp32: weights, two moments) and
    its model."""
    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    there = sum(file.stat().st_size for file in folder.glob(f"{STATE}/*"))
    need = (KEPT + 1) * (weights + moments) + weights - there
    free = shutil.disk_usage(folder).free
    if free < need:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, but {KEPT} training states, one "
                         f"being written, and the model take {need / 1e9:.1f} GB more: free some, "
                         "or take another --out")


def newest_state(folder: Path) -> Path | None:
    """The furthest complete training state in a folder."""
    return max(folder.glob(STATE), default=None)


def drop_states(folder: Path) -> None:
    """Delete all training states in a folder, and those that were not written to their end."""
    for state in [*folder.glob(STATE), *folder.glob(f"{STATE}.partial")]:
        shutil.rmtree(state, ignore_errors=True)        # NFS keeps what another program has open
