"""Started by test_shard.py, by itself or by torchrun: a step's gradients, calculated in bf16.

    torchrun --nproc_per_node N tests/helpers/bf16_gradients.py OUT.safetensors

Prints the loss and, for a mesh of copies, how long its groups wait, as JSON.
"""
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import Sample
from plumbing.processes import start_processes
from small_models import SAMPLES, in_bytes, labelled, small_vlm
from train import accumulate_gradients, mesh_of, shard


def main() -> None:
    device = start_processes(timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = small_vlm()
    shard(model, device, bf16=True)
    rows = [[Sample(tokens, labelled(tokens), *in_bytes(pixels), "")]
            for tokens, pixels in SAMPLES[:4]]
    loss, _, _ = accumulate_gradients(model, rows[rank::world], device)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    waits = []
    if world > 1:
        copies = small_vlm()
        shard(copies, device, shard_size=1)
        names = {p.device_mesh.mesh_dim_names for p in copies.parameters()}
        assert names == {("replicate", "shard")}
        mesh = mesh_of(device, 1, timedelta(seconds=77))
        for name in mesh.mesh_dim_names:
            backend = mesh.get_group(name)._get_backend(torch.device("cpu"))
            waits.append(backend.options._timeout.total_seconds())
    if rank == 0:
        save_file(gradients, sys.argv[1])
        print(json.dumps([loss.item(), waits]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
