"""The bytes of each part that one real training step has, beside the plan's: see test_plan.py.

    torchrun --nproc_per_node 2 tests/helpers/measure.py toy|mid|short

mid is SigLIP base-patch16-224 with SmolLM2-135M; short is the same with three layers each, for a
quick test.
"""
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import SMALL as MID
from data import Sample
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, AlignVLMConfig
from paper.plan import memory
from paper.recipes import RECIPES
from plumbing.processes import start_processes
from small_models import in_bytes
from train import optimizer_of, shard, take_step

SHORT = AlignVLMConfig(replace(MID.vision, n_layers=3), replace(MID.llm, n_layers=3))
CONFIGS = {"toy": ALIGNVLM_PRESETS["toy"], "mid": MID, "short": SHORT}


def extra_bytes(work: Callable[[], None]) -> int:
    """The most that `work` had in memory beyond what it leaves there, which are gradients: another
    part of the plan."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    live, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most - live


def connector_bytes(model: AlignVLM) -> int:
    """Of one tile's connector. Leaves no gradients."""
    v, l = model.config.vision, model.config.llm
    F = torch.randn(v.n_patches, v.hidden_size, requires_grad=True)            # (N, d)
    E_text = torch.randn(l.vocab_size, l.hidden_size, requires_grad=True)      # (V, D)
    most = extra_bytes(lambda: model.connector(F, E_text).sum().backward())
    model.zero_grad()
    return most


def main() -> None:
    config = CONFIGS[sys.argv[1]]
    device = start_processes()
    torch.manual_seed(0)
    model = AlignVLM(config)
    model.init_weights()
    sizes = {"connector": connector_bytes(model)}

    shard(model, device)
    recipe = RECIPES["toy"][2]
    optimizer = optimizer_of(model, recipe)
    v = config.vision
    tokens = torch.cat([torch.full((v.n_patches,), IMAGE), torch.arange(8)])   # (L,)
    pixels = torch.randn(1, 3, v.image_size, v.image_size)
    row = [Sample(tokens, tokens.roll(-1).clamp(min=0), *in_bytes(pixels), "one")]

    def measure_gradients(*_) -> None:
        sizes["gradients"] = sum(p.grad.to_local().nbytes for p in model.parameters())

    optimizer.register_step_pre_hook(measure_gradients)
    take_step(model, optimizer, [row], 1e-3, 1.0, device)
    sizes["parameters"] = sum(p.to_local().nbytes for p in model.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values()]
    sizes["optimizer"] = sum(x.to_local().nbytes for x in moments if hasattr(x, "to_local"))
    if dist.get_rank() == 0:
        plan = memory(config, recipe.trainable, dist.get_world_size(), len(tokens), 1, 8, size=4)
        print(json.dumps({name: [size, plan[name]] for name, size in sizes.items()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
