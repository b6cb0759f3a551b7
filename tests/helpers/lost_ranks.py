"""One of six gloo processes, of which one stalls, dies, is late, or has a GPU.

    python tests/helpers/lost_ranks.py stalls|dies|dies-loading|is-late|has-a-gpu LOST FOLDER RANK

LOST is that one. The others come to the next collective one after another. Prints what
name_stalled_rank says.
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

WORLD = 6
PATIENCE = timedelta(seconds=100)       # six processes that start together on two cores
TIMEOUT = timedelta(seconds=6)


def work(rank: int, how: str, lost: int, folder: Path) -> None:
    """What a rank does until one of them is lost."""
    if how == "has-a-gpu":
        check_same_kind(torch.device("cuda" if rank == lost else "cpu", 0))
    if how == "dies-loading":
        load_a_state(rank == lost, folder)
    dist.barrier()
    group = dist.new_group(timeout=TIMEOUT)
    dist.all_reduce(torch.ones(3), group=group)
    if rank == lost:
        if how == "dies":
            os._exit(9)
        time.sleep(TIMEOUT.seconds + 4 if how == "is-late" else 300)
    time.sleep(0.2 * (WORLD - rank))
    dist.all_reduce(torch.ones(3), group=group)


def load_a_state(dies: bool, folder: Path) -> None:
    model = nn.Linear(12, 12)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW(model.parameters())
    states = States(folder, model, optimizer, PATIENCE)
    states.save(3, {"step": 3})
    states.finish()
    dist.barrier()
    if dies:
        dcp.FileSystemReader.read_data = lambda *_: os._exit(9)     # as the kernel, out of memory
    states.load(newest_state(folder))


def main() -> None:
    how, lost, folder, rank = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    try:
        with name_stalled_rank(TIMEOUT):
            work(rank, how, lost, folder)
    except InputError as error:
        print(error, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
