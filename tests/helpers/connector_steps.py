"""Started by test_connectors.py, by itself or by torchrun: two training steps with each connector.

    python tests/helpers/connector_steps.py
    torchrun --nproc_per_node 2 tests/helpers/connector_steps.py

Prints the losses by connector, as JSON.
"""
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from connector import CONNECTORS
from data import Sample
from model import IMAGE, AlignVLM, AlignVLMConfig
from paper.recipes import RECIPES
from plumbing.processes import start_processes
from small_models import CONNECTOR, LLM, TILES, in_bytes
from train import optimizer_of, shard, take_step


def losses_of(kind: str, device: torch.device) -> list[float]:
    """Two steps on four samples, dealt among the ranks; of all kinds with one seed."""
    torch.manual_seed(0)
    model = AlignVLM(AlignVLMConfig(TILES, LLM, replace(CONNECTOR, kind=kind)))
    model.vision.init_weights()
    model.llm.init_weights()
    shard(model, device)
    model.connector.init_weights(model.llm.head)
    samples = []
    for i in range(4):
        image = torch.full((model.config.tile_tokens,), IMAGE)
        tokens = torch.cat([image, torch.arange(i, i + 6)])
        labels = tokens.roll(-1).clamp(min=0)
        samples.append(Sample(tokens, labels, *in_bytes(torch.randn(1, 3, 12, 12)), str(i)))
    rows = [[sample] for sample in samples[dist.get_rank()::dist.get_world_size()]]
    optimizer = optimizer_of(model, RECIPES["toy"][2])
    losses = []
    for _ in range(2):
        numbers, _, _ = take_step(model, optimizer, rows, lr=1e-2, clip=1.0, device=device)
        losses.append(numbers[0].item())
    return losses


if __name__ == "__main__":
    device = start_processes(timedelta(seconds=60))
    everything = {kind: losses_of(kind, device) for kind in CONNECTORS if kind != "align"}
    if dist.get_rank() == 0:
        print(json.dumps(everything))
    dist.destroy_process_group()
