"""Six gloo processes, one of which stalls, dies, dies while it reads a state, or has a GPU.

    python tests/helpers/lost_ranks.py stalls|dies|dies-loading|has-a-gpu FOLDER

The others come to the next collective at different times. Prints what each says, `RANK: line`.
"""
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from plumbing.processes import check_same_kind, name_stalled_rank
from plumbing.settings import InputError
from plumbing.states import States, newest_state

WORLD, LOST = 6, 4
TIMEOUT = timedelta(seconds=4)


def work(rank: int, how: str, folder: Path) -> None:
    """What a rank does until one of them is lost."""
    if how == "has-a-gpu":
        check_same_kind(torch.device("cuda" if rank == LOST else "cpu", 0))
    if how == "dies-loading":
        load_a_state(rank, folder)
    dist.all_reduce(torch.ones(3))
    if rank == LOST:
        if how == "dies":
            os._exit(9)
        time.sleep(60)
    time.sleep(0.2 * (WORLD - rank))
    dist.all_reduce(torch.ones(3))


def load_a_state(rank: int, folder: Path) -> None:
    model = nn.Linear(12, 12)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW(model.parameters())
    states = States(folder, model, optimizer, TIMEOUT)
    states.save(3, {"step": 3})
    states.finish()
    dist.barrier()
    if rank == LOST:
        dcp.FileSystemReader.read_data = lambda *_: os._exit(9)     # as the kernel, out of memory
    states.load(newest_state(folder))


def run(rank: int, how: str, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    try:
        with name_stalled_rank(TIMEOUT):
            work(rank, how, folder)
    except InputError as error:
        print(f"{rank}: {error}\n", end="", flush=True)


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2])
    ranks = []
    for rank in range(WORLD):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            run(rank, how, folder)
            os._exit(0)
    for rank, process in enumerate(ranks):
        if rank != LOST:
            os.waitpid(process, 0)
    os.kill(ranks[LOST], 9)


if __name__ == "__main__":
    main()
