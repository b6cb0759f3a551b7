"""Started by test_weights.py as a process of its own, which is measured:

    python tests/helpers/loading.py load LLAMA_FOLDER           # Llama.from_pretrained in bf16
    python tests/helpers/loading.py time LLAMA_FOLDER           # by hand: that against load_file and a clone of every tensor
    torchrun --nproc_per_node 2 tests/helpers/loading.py ranks LLAMA_FOLDER OUT             # every rank its part, in bf16
    torchrun --nproc_per_node 2 tests/helpers/loading.py vlm VISION_FOLDER LLM_FOLDER OUT   # from_backbones, then saved

Prints JSON; ranks writes it to OUT/RANK. The peak is what came on top of importing torch.
"""
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def peak() -> int:
    """Bytes of the largest resident set of this process (its own: ru_maxrss would begin with its parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024


IMPORTED = peak()


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def load_and_clone(folder: Path) -> None:
    from safetensors.torch import load_file
    kept = []
    for file in sorted(folder.glob("*.safetensors")):
        kept += [tensor.clone() for tensor in load_file(file).values()]


what, *paths = sys.argv[1:]
if what in ("load", "time"):
    from model import Llama
    if what == "load":
        model = Llama.from_pretrained(paths[0], torch.bfloat16)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print(json.dumps({"peak": peak() - IMPORTED, "bytes": size}))
    else:
        ours, theirs = [], []
        for _ in range(2):      # turn by turn, and the best of each: a busy machine slows down both
            theirs.append(timed(lambda: load_and_clone(Path(paths[0]))))
            ours.append(timed(lambda: Llama.from_pretrained(paths[0], torch.bfloat16)))
        print(json.dumps({"ours": min(ours), "load_file and clone": min(theirs)}))
else:
    import torch.distributed as dist

    from model import AlignVLM, Llama
    from plumbing.processes import start_processes

    device = start_processes()
    if what == "ranks":
        from torch.distributed.fsdp import fully_shard

        def shard_llama(model: Llama) -> None:
            for module in [*model.layers, model]:
                fully_shard(module)

        model = Llama.from_pretrained(paths[0], torch.bfloat16, shard=shard_llama)
        own = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
        (Path(paths[1]) / str(dist.get_rank())).write_text(json.dumps({"peak": peak() - IMPORTED, "bytes": own}))
        dist.barrier()
    else:
        from train import shard

        torch.manual_seed(0)
        model = AlignVLM.from_backbones(paths[0], paths[1], torch.float32, device, lambda model: shard(model, device))
        model.save_pretrained(paths[2], Path(paths[1]) / "tokenizer.model", torch.float32)
    dist.destroy_process_group()
