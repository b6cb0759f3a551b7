"""Started by torchrun from test_plan.py: the bytes of each part that one real training step has, beside the plan's.

    torchrun --nproc_per_node 2 tests/helpers/measure.py toy|mid|short

mid is SigLIP base-patch16-224 with SmolLM2-135M; short is the same with three layers each, for a quick test.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import Sample
from model import ALIGNVLM_PRESETS, IMAGE, AlignVLM, AlignVLMConfig, LlamaConfig
from paper.plan import memory
from plumbing.processes import start_processes
from train import RECIPES, optimizer_of, shard, take_step
from vision import SigLIPConfig

MID = AlignVLMConfig(SigLIPConfig(768, 12, 12, 3072, 224, 16, 1e-6),
                     LlamaConfig(vocab_size=49152, hidden_size=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
                                 intermediate_size=1536, rope_factor=1.0, tie_embeddings=True))


def extra_bytes(work) -> int:
    """The most that `work` had in memory beyond what it leaves there, which are gradients: another part of the plan."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live, most = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most - live


SHORT = AlignVLMConfig(replace(MID.vision, n_layers=3), replace(MID.llm, n_layers=3))
config = {"toy": ALIGNVLM_PRESETS["toy"], "mid": MID, "short": SHORT}[sys.argv[1]]
torch.backends.mkldnn.is_available = lambda: False      # the plan is a GPU's: oneDNN's products need some memory more
device = start_processes()
torch.manual_seed(0)
model = AlignVLM(config)
model.vision.init_weights()
model.llm.init_weights()
model.connector.init_weights(model.llm.head)
v, D = config.vision, config.llm.hidden_size
F = torch.randn(v.n_patches, v.hidden_size, requires_grad=True)
E_text = torch.randn(config.llm.vocab_size, D, requires_grad=True)
connector = extra_bytes(lambda: model.connector(F, E_text).sum().backward())
model.zero_grad()

shard(model, device)
recipe = RECIPES["toy"][2]
optimizer = optimizer_of(model, recipe)
tokens = torch.cat([torch.full((v.n_patches,), IMAGE), torch.arange(8)])
row = [Sample(tokens, tokens.roll(-1).clamp(min=0), torch.randn(1, 3, v.image_size, v.image_size), "one")]
sizes = {}
optimizer.register_step_pre_hook(lambda *_: sizes.update(gradients=sum(
    p.grad.to_local().nbytes for p in model.parameters())))
take_step(model, optimizer, [row], 1e-3, 1.0, device)
sizes["parameters"] = sum(p.to_local().nbytes for p in model.parameters())
sizes["optimizer"] = sum(x.to_local().nbytes for state in optimizer.state.values() for x in state.values()
                         if hasattr(x, "to_local"))
sizes["connector"] = connector
if dist.get_rank() == 0:
    plan = memory(config, recipe.trainable, dist.get_world_size(), len(tokens), 1, 8, size=4)
    print(json.dumps({name: [size, plan[name]] for name, size in sizes.items()}))
dist.barrier()
dist.destroy_process_group()
