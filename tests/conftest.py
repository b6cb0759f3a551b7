"""What every test finds: the repository and tests/helpers on sys.path, one thread, a trained stage.

Tests import what they share from here: commands from helpers/commands.py, random weights and the
measure of "equal" from helpers/tensors.py.
"""
import json
import os
import signal
import sys
from pathlib import Path

import pytest

# Tests and what they start run on the CPU, whatever the machine has. tests/gpu/checks.py does not.
if os.environ.get("TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent / "helpers")]
pytest.register_assert_rewrite("commands", "sets", "small_models", "tensors")
from commands import (ENV, HELPERS, ROOT, alone, launcher, run, sample, start,  # noqa: F401
                      torchrun)
from tensors import close, n_parameters, randomise, shapes  # noqa: F401

# The tensors are tiny: on a busy machine threads that wait for each other cost 10 times more.
torch.set_num_threads(1)
# What a script starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def rows(folder: Path) -> list[dict]:
    """The log of a stage."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float | None]:
    """By step; of a step that was done twice, the last."""
    return list({row["step"]: row["loss"] for row in rows(folder) if "loss" in row}.values())


@pytest.fixture(scope="session")
def stage1(tmp_path_factory) -> Path:
    """The toy after two steps of stage 1: where trainings of stage 2 may start."""
    out = tmp_path_factory.mktemp("stage1")
    run("train.py", "--stage", 1, "--steps", 2, "--batch-size", 4, "--out", out)
    return out / "stage1"
