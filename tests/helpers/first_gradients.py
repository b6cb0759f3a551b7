"""train.py itself, which also saves the gradients of its first step: started by test_ranks.py.

    torchrun --nproc_per_node N tests/helpers/first_gradients.py OUT.safetensors [train.py's flags]
"""
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train

path = Path(sys.argv.pop(1))
accumulate = train.accumulate_gradients


def accumulate_and_save(model, rows, device):
    result = accumulate(model, rows, device)
    train.accumulate_gradients = accumulate
    gradients = {name: p.grad.full_tensor().contiguous()
                 for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        save_file(gradients, path)
    return result


train.accumulate_gradients = accumulate_and_save
train.main()
