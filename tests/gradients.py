"""Started by torchrun from test_train.py: the gradients of stage 2's first step, saved by rank 0.

    torchrun --nproc_per_node N tests/gradients.py MODEL_FOLDER OUT.safetensors [--micro-batch M]
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Tokenizer, pack
from model import AlignVLM
from train import RECIPES, ToyDocuments, accumulate_gradients, batch_indices, shard, start_processes

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--micro-batch", type=int)
args = parser.parse_args()

device = start_processes()
model = AlignVLM.from_pretrained(args.folder).to(device)
shard(model, device)
recipe = replace(RECIPES["toy"][2], batch_size=8, steps=1)
documents = ToyDocuments(2, 8, 0, Tokenizer(args.folder), model.config.vision)
micro = args.micro_batch or 8 // dist.get_world_size()
batches = [pack([documents[i] for i in indices]) for indices in batch_indices(recipe, micro)]
accumulate_gradients(model, batches, device)
gradients = {name: p.grad.full_tensor().contiguous() for name, p in model.named_parameters()}
if dist.get_rank() == 0:
    save_file(gradients, args.out)
dist.barrier()      # a rank that leaves while the other still works aborts now and then
dist.destroy_process_group()
