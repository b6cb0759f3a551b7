"""Kill training with SIGKILL again and again, resume it, and compare with a run that nobody disturbed, bit for bit.

    python tests/helpers/kill.py                                # 20 runs, a third of them killed while a state is being written
    python tests/helpers/kill.py --runs 3 --processes 2
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def start_python(*command) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def training(out: Path, processes: int, steps: int) -> list:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [*launcher, "train.py", "--stage", 2, "--steps", steps, "--batch-size", 4, "--save-every", 4, "--out", out]


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1]
    assert process.returncode == 0, error


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def joined_losses(rows: list[dict]) -> list[float]:
    """The losses by step; what a resumed run did again counts, not what the killed one had done."""
    losses = {}
    for row in rows:
        if "resumed" in row:
            losses = {step: loss for step, loss in losses.items() if step < row["resumed"]}
        else:
            losses[row["step"]] = row["loss"]
    assert list(losses) == list(range(len(losses)))
    return list(losses.values())


def kill(process: subprocess.Popen, partial: Path, while_writing: bool, rng: random.Random, seconds: float) -> str:
    """SIGKILL to all of its processes: at a random moment, or as soon as a state is being written from a random step
    on. Returns what was found in the folder then."""
    began, first = time.time(), rng.randrange(1, 5)
    moment = rng.uniform(0.2, 0.95) * seconds
    while process.poll() is None:
        writing = [path for path in partial.glob("step-*.partial") if int(path.stem[5:]) >= 4 * first]
        if writing if while_writing else time.time() - began > moment:
            time.sleep(rng.uniform(0, 0.03) if while_writing else 0)
            break
        time.sleep(0.001)
    process.kill()
    subprocess.run(["pkill", "-KILL", "-f", partial.parent])        # torchrun's processes: they, too, name --out
    process.communicate()
    return ", ".join(sorted(path.name for path in partial.glob("step-*"))) or "no state"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    kill_and_compare(**vars(parser.parse_args()))


def kill_and_compare(runs: int, processes: int, steps: int, seed: int, start=start_python) -> None:
    """start: what starts the killed runs. The others are Python's own, with another seed of str's hash."""
    rng, work = random.Random(seed), Path(tempfile.mkdtemp())
    try:
        finish(start("train.py", "--stage", 1, "--steps", 2, "--batch-size", 4, "--out", work / "start"))

        def folder(name: str) -> Path:
            (work / name).mkdir()
            (work / name / "stage1").symlink_to(work / "start" / "stage1")
            return work / name

        finish(start_python(*training(folder("whole"), processes, steps)))
        whole = joined_losses(lines(work / "whole" / "stage2"))
        weights = load_file(work / "whole" / "stage2" / "model.safetensors")
        began = time.time()
        finish(start(*training(folder("timed"), processes, steps)))
        seconds = time.time() - began
        found, writing = 0, 0
        for run in range(runs):
            out = folder(f"run{run}")
            while_writing = run % 3 == 0
            process = start(*training(out, processes, steps))
            there = kill(process, out / "stage2.partial", while_writing, rng, seconds)
            writing += ".partial" in there
            complete = (out / "stage2").exists()
            finish(start(*training(out, processes, steps)))
            rows = lines(out / "stage2")
            assert joined_losses(rows) == whole, "other losses"
            resumed = [row["resumed"] for row in rows if row.get("resumed")]
            states = [name for name in there.split(", ") if name.startswith("step-") and not name.endswith(".partial")]
            assert bool(resumed) == bool(states) or complete
            for name, p in load_file(out / "stage2" / "model.safetensors").items():
                assert p.equal(weights[name]), name
            found += bool(resumed)
            print(f"run {run}: killed with {there}; resumed from {resumed or 'the start'}; the same", flush=True)
            shutil.rmtree(out)
        print(f"{runs} runs killed, {writing} of them while a state was being written, {found} resumed from a state: "
              "all losses and weights equal the undisturbed run's")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
