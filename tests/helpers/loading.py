"""Started by test_weights.py as a process of its own, which is measured:

    python tests/helpers/loading.py load LLAMA_FOLDER       # Llama.from_pretrained in bf16
    torchrun --nproc_per_node 2 tests/helpers/loading.py ranks LLAMA_FOLDER OUT
    torchrun --nproc_per_node 2 tests/helpers/loading.py vlm VISION_FOLDER LLM_FOLDER OUT

ranks: every rank its part, in bf16. vlm: from_backbones, then saved. Prints JSON; ranks writes it
to OUT/RANK. The peak is what came on top of importing torch.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def peak() -> int:
    """Bytes of the largest resident set of this process.

    Its own: ru_maxrss would begin with its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024


IMPORTED = peak()

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from model import AlignVLM, Llama
from plumbing.processes import start_processes


def load(folder: str) -> None:
    model = Llama.from_pretrained(folder, torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"peak": peak() - IMPORTED, "bytes": size}))


def load_part(folder: str, out: str) -> None:
    def shard_llama(model: Llama) -> None:
        for module in [*model.layers, model]:
            fully_shard(module)

    start_processes()
    model = Llama.from_pretrained(folder, torch.bfloat16, shard=shard_llama)
    own = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    result = {"peak": peak() - IMPORTED, "bytes": own}
    (Path(out) / str(dist.get_rank())).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def load_and_save(vision: str, llm: str, out: str) -> None:
    from train import shard
    device = start_processes()
    torch.manual_seed(0)
    model = AlignVLM.from_backbones(vision, llm, torch.float32, device,
                                    lambda model: shard(model, device))
    model.save_pretrained(out, Path(llm) / "tokenizer.model", torch.float32)
    dist.destroy_process_group()


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    {"load": load, "ranks": load_part, "vlm": load_and_save}[what](*paths)
