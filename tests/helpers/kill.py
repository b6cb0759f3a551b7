"""Kill training with SIGKILL again and again, resume it, and compare it with an undisturbed run.

    python tests/helpers/kill.py            # 20 runs, a third killed while a state is being written
    python tests/helpers/kill.py --runs 3 --processes 2

All losses and weights have to be the same, bit for bit.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from commands import alone, launcher
from safetensors.torch import load_file

SAVE_EVERY = 4      # steps


def training(out: Path, processes: int, steps: int) -> list:
    command = launcher(processes) if processes > 1 else []
    return [*command, "train.py", "--stage", 2, "--steps", steps, "--batch-size", 4,
            "--save-every", SAVE_EVERY, "--out", out]


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    assert process.returncode == 0, error


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def joined_losses(rows: list[dict]) -> list[float]:
    """The losses by step; what a resumed run did again counts, not what the killed one had done."""
    losses: dict[int, float] = {}
    for row in rows:
        if "resumed" in row:
            losses = {step: loss for step, loss in losses.items() if step < row["resumed"]}
        else:
            losses[row["step"]] = row["loss"]
    assert list(losses) == list(range(len(losses)))
    return list(losses.values())


def kill(process: subprocess.Popen, partial: Path, while_writing: bool, rng: random.Random,
         seconds: float) -> list[str]:
    """SIGKILL to all of its processes: at a random moment of the seconds that a run takes, or as
    soon as a state is being written from a random step on. Returns what was found in the folder."""
    began, first = time.time(), rng.randrange(1, 5)
    moment = rng.uniform(0.2, 0.95) * seconds
    while process.poll() is None:
        writing = [path for path in partial.glob("step-*.partial")
                   if int(path.stem[5:]) >= SAVE_EVERY * first]
        if while_writing and writing:
            time.sleep(rng.uniform(0, 0.03))
            break
        if not while_writing and time.time() - began > moment:
            break
        time.sleep(0.001)
    below = descendants(process.pid)
    process.kill()
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return sorted(path.name for path in partial.glob("step-*"))


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have; on Linux."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):         # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


def kill_and_compare(runs: int, processes: int, steps: int, seed: int, start=alone) -> int:
    """How many of the runs went on from a state; that all end alike is asserted.

    start: what starts the killed runs. The others are Python's own, with another seed of str's
    hash.
    """
    rng, work = random.Random(seed), Path(tempfile.mkdtemp())
    try:
        finish(start("train.py", "--stage", 1, "--steps", 2, "--batch-size", 4,
                     "--out", work / "start"))
        undisturbed = folder(work, "undisturbed")
        finish(alone(*training(undisturbed, processes, steps)))
        began = time.time()
        finish(start(*training(folder(work, "timed"), processes, steps)))
        seconds = time.time() - began
        found, writing = 0, 0
        for number in range(runs):
            out = folder(work, f"run{number}")
            process = start(*training(out, processes, steps))
            there = kill(process, out / "stage2.partial", number % 3 == 0, rng, seconds)
            complete = (out / "stage2").exists()
            finish(start(*training(out, processes, steps)))
            resumed = check_same(undisturbed / "stage2", out / "stage2")
            states = [name for name in there if not name.endswith(".partial")]
            assert bool(resumed) == bool(states) or complete
            found += bool(resumed)
            writing += len(states) < len(there)
            print(f"run {number}: killed with {', '.join(there) or 'no state'}; resumed from "
                  f"{resumed or 'the start'}; the same", flush=True)
            shutil.rmtree(out)
        print(f"{runs} runs killed, {writing} of them while a state was being written, {found} "
              "resumed from a state: all losses and weights equal the undisturbed run's")
        return found
    finally:
        shutil.rmtree(work)


def folder(work: Path, name: str) -> Path:
    """One more run's, with the stage 1 that all start from."""
    (work / name).mkdir()
    (work / name / "stage1").symlink_to(work / "start" / "stage1")
    return work / name


def check_same(undisturbed: Path, killed: Path) -> list[int]:
    """Assert that losses and weights of two stages are equal. Returns the steps that the killed one
    was resumed from, the start apart."""
    rows = lines(killed)
    assert joined_losses(rows) == joined_losses(lines(undisturbed)), "other losses"
    weights = load_file(undisturbed / "model.safetensors")
    for name, p in load_file(killed / "model.safetensors").items():
        assert p.equal(weights[name]), name
    return [row["resumed"] for row in rows if row.get("resumed")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    kill_and_compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
