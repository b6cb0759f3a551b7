"""Started by torchrun from test_train.py: the gradients of stage 2's first step, saved by rank 0.

    torchrun --nproc_per_node N tests/gradients.py MODEL_FOLDER OUT.safetensors [--row-tokens R]
"""
import argparse
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Tokenizer, fill_rows
from model import AlignVLM
from train import ToyDocuments, accumulate_gradients, shard, start_processes

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--row-tokens", type=int, default=8192)
args = parser.parse_args()

device = start_processes()
model = AlignVLM.from_pretrained(args.folder).to(device)
shard(model, device)
documents = ToyDocuments(2, 7, 0, Tokenizer(args.folder), model.config.vision)
share = range(dist.get_rank(), 7, dist.get_world_size())
accumulate_gradients(model, fill_rows([documents[i] for i in share], args.row_tokens), device)
gradients = {name: p.grad.full_tensor().contiguous() for name, p in model.named_parameters()}
if dist.get_rank() == 0:
    save_file(gradients, args.out)
dist.barrier()      # a rank that leaves while the other still works aborts now and then
dist.destroy_process_group()
