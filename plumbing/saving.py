"""A model's folder, written: all of it or nothing."""
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from plumbing.files import to_disk
from plumbing.settings import CheckpointError, InputError, read_json

MARK = "config.json.partial"    # what `save` writes first, and names config.json at its end
BEGUN = (MARK, "recipe.json", "recipe.json.partial")    # in an unfinished folder, by train.py too
# What `save` and train.py write into a model's folder; all else that lies there is the user's.
OWN_FILES = re.compile(r"(config|recipe|align_vocab|held_out)\.json|log\.jsonl"
                       r"|tokenizer\.(model|json)|model(-\d{5}-of-\d{5})?\.safetensors"
                       r"|model\.safetensors\.index\.json")


def save(model: nn.Module, config: dict, folder: Path, tokenizer_file: Path, dtype: torch.dtype,
         shard_bytes: int) -> None:
    """Write config.json, safetensors and the tokenizer's file beside `folder`, then rename.

    So the folder is complete or not there. An older model of ours in it is replaced, and what
    else lies there stays; any other folder that holds something is refused (InputError).

    Over shard_bytes the tensors go to several files with an index. Of a sharded model (FSDP2)
    every rank calls this. The first one writes, and of the whole model it holds one file's
    tensors at a time.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    partial = folder.with_name(folder.name + ".partial")
    mark = partial / MARK
    refusal = [why_not(folder, partial, tokenizer_file) if writes else None]
    if dist.is_initialized():
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise InputError(refusal[0])
    if writes:
        partial.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(config, indent=2) + "\n")
        for old in partial.glob("model*.safetensors*"):
            old.unlink()
    places = write_tensors(model, partial, dtype, shard_bytes, writes)
    if writes:
        if len(set(places.values())) > 1:
            size = sum(p.numel() for p in model.state_dict().values()) * dtype.itemsize
            index = {"metadata": {"total_size": size}, "weight_map": places}
            index_file = partial / "model.safetensors.index.json"
            index_file.write_text(json.dumps(index, indent=2) + "\n")
        if tokenizer_file.parent != partial:
            shutil.copyfile(tokenizer_file, partial / tokenizer_file.name)
        os.replace(mark, partial / "config.json")
        for file in set(places.values()):       # save_file lets nobody but its owner read them
            shutil.copymode(partial / "config.json", partial / file)
        put_in_place(partial, folder)
    if dist.is_initialized():
        dist.barrier()


def why_not(folder: Path, partial: Path, tokenizer_file: Path | None = None) -> str | None:
    """Why a model cannot be saved in `folder`, in a line; None if it can."""
    if tokenizer_file and not tokenizer_file.is_file():
        return f"{tokenizer_file}: the tokenizer's file is no such file"
    for path in (folder, partial):
        if path.exists() and not path.is_dir():
            return f"{path}: a file, where a model's folder should be: take another name"
        if path.is_dir() and any(path.iterdir()) and not is_own(path, unfinished=path == partial):
            return (f"{path}: holds something, and is not a model's folder of ours: take another "
                    "name, or empty it")
    return None


def is_own(folder: Path, unfinished: bool) -> bool:
    """Whether train.py or `save` made a folder: its config.json is ours. An unfinished one may lack
    that: then it has what was written there first, perhaps not to its end."""
    if (folder / "config.json").exists():
        try:
            return read_json(folder / "config.json").get("model_type") == "alignvlm"
        except CheckpointError:
            return False
    return unfinished and any((folder / name).exists() for name in BEGUN)


@torch.no_grad()
def write_tensors(model: nn.Module, folder: Path, dtype: torch.dtype, shard_bytes: int,
                  writes: bool) -> dict[str, str]:
    """Write a model's tensors, in `dtype`, into one file or several -> name -> its file.

    writes: whether this rank does; the others help to put sharded tensors together.
    """
    state = model.state_dict()
    groups, size = [[]], 0
    for name, p in state.items():
        if groups[-1] and size + p.numel() * dtype.itemsize > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += p.numel() * dtype.itemsize
    places = {}
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            file = "model.safetensors"
        tensors = {}
        for name in names:
            p = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
            if writes:
                tensors[name] = p.to("cpu", dtype).contiguous()
        if writes:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            to_disk(folder / file)              # train.py deletes its states next
        if dist.is_initialized():
            dist.barrier()      # each file has the whole time-out, not all of them together
        places |= dict.fromkeys(names, file)
    return places


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what the user has put into an older one moves over.

    A kill at any moment leaves one complete folder, here or in one beside it, NAME.old-...
    """
    if not folder.exists():
        os.rename(partial, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.old-", dir=folder.parent))
    os.rename(folder, old)          # old is empty: a folder may take its place
    os.rename(partial, folder)
    for path in old.iterdir():
        if not OWN_FILES.fullmatch(path.name) and not (folder / path.name).exists():
            os.rename(path, folder / path.name)
    shutil.rmtree(old)
