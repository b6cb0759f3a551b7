"""Weights on disk: tensors that are read block by block into a module, and written.

A tensor is a `Stored`, of which nothing is read before it is asked for. `load` builds a module
without memory and reads into place, of a sharded one only this rank's rows.
"""
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plumbing.settings import CheckpointError, InputError, read_json

BLOCK_BYTES = 32 * 2 ** 20      # what is copied at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What `save` and train.py write into a model's folder; all else that lies there is the user's.
OWN_FILES = re.compile(r"(config|recipe|align_vocab|held_out)\.json|log\.jsonl"
                       r"|tokenizer\.(model|json)|model(-\d{5}-of-\d{5})?\.safetensors"
                       r"|model\.safetensors\.index\.json")


def model_folder(name: str | Path) -> Path:
    """A folder or file of that name, or else the hub's model `owner/name@revision`, in its cache.

    Raises InputError. A path that is neither comes back: who opens it will say what is missing.
    """
    if os.path.exists(name):
        return Path(name)
    from plumbing.hub import hub_folder
    return hub_folder(str(name))


@dataclass
class Stored:
    """A tensor in a file: rows(start, stop) reads that part of it, and nothing is read before."""
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None               # None: not a floating-point one
    rows: Callable[[int, int], Tensor]

    def equals(self, other: "Stored | None") -> bool:
        """Whether another matrix is the same, without reading more than it takes to tell."""
        if other is None or self.shape != other.shape or self.dtype != other.dtype:
            return False
        return all(torch.equal(self.rows(i, i + 4096), other.rows(i, i + 4096))
                   for i in range(0, self.shape[0], 4096))


@dataclass
class Weights:
    """The tensors of a folder, and how the parameters of a module are called there."""
    path: Path                              # the file that lists the tensors
    tensors: dict[str, Stored]
    key: Callable[[str], str] = str         # a parameter's name -> its tensor's
    ignored: str = "$^"                     # a pattern: tensors that the module has no use for

    def part(self, name: str) -> "Weights":
        """Those of one submodule of a folder that holds a model of ours."""
        return Weights(self.path, self.tensors, lambda of_part: f"{name}.{of_part}",
                       rf"(?!{name}\.).*")

    def check(self, module: nn.Module) -> list[torch.dtype]:
        """The dtypes of the module's tensors.

        Raises CheckpointError if one is missing, unexpected, mis-shaped or quantised.
        """
        expected = {self.key(name): tuple(p.shape) for name, p in module.named_parameters()}
        for key in expected:
            if key not in self.tensors:
                raise CheckpointError(f"{self.path}: no tensor {key}, which the configuration "
                                      "asks for")
        for key, stored in self.tensors.items():
            if key not in expected:
                if not re.fullmatch(self.ignored, key):
                    raise CheckpointError(f"{stored.path}: unexpected tensor {key}, no part of "
                                          "the configuration")
            elif stored.dtype is None:
                raise CheckpointError(f"{stored.path}: {key} does not hold floating-point "
                                      "numbers: quantised?")
            elif stored.shape != expected[key]:
                raise CheckpointError(f"{stored.path}: {key} has shape {list(stored.shape)}, "
                                      f"the configuration asks for {list(expected[key])}")
        return [self.tensors[key].dtype for key in expected]

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Copy the tensors into the module's parameters, block by block.

        Of a sharded module only this rank's rows are read. Raises CheckpointError for a number
        that is not finite: such a model answers nothing, and learns nothing.
        """
        for name, p in module.named_parameters():
            stored = self.tensors[self.key(name)]
            here, first = local_rows(p)
            bytes_per_row = p.element_size() * math.prod(p.shape[1:])
            step = max(1, BLOCK_BYTES // bytes_per_row)
            for start in range(0, len(here), step):
                block = here[start:start + step]
                rows = stored.rows(first + start, first + start + len(block))
                if not torch.stack(rows.aminmax()).isfinite().all():
                    raise CheckpointError(f"{stored.path}: {self.key(name)} has weights that are "
                                          "not finite: damaged, or its training has diverged")
                block.copy_(rows)


def local_rows(p: nn.Parameter) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank holds, and the first one's number.

    They are all of it, unless FSDP2 has sharded it.
    """
    if not hasattr(p, "to_local"):
        return p, 0
    mesh = p.device_mesh                        # its last dimension shards, one before replicates
    chunk = -(-p.shape[0] // mesh.size(-1))     # equal chunks; the last ones shorter or empty
    return p.to_local(), mesh.get_coordinate()[-1] * chunk


def load(build: Callable[[], nn.Module], parts: dict[str, Weights], dtype: torch.dtype | None,
         device, shard: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Build a module on the meta device and read its weights into place: never a second copy.

    parts: submodule -> its weights ("" is the module itself). dtype None keeps the stored one, the
    widest of several. shard: what cuts the module among ranks (FSDP2's fully_shard) before it has
    memory, so that no rank holds or reads more than its part. Raises CheckpointError.
    """
    with torch.device("meta"):
        module = build()
    stored = []
    for name, weights in parts.items():
        stored += weights.check(module.get_submodule(name))
    module.to(dtype or reduce(torch.promote_types, stored))
    if shard is not None:
        shard(module)
    module.to_empty(device=device)
    for name, weights in parts.items():
        weights.fill(module.get_submodule(name))
    return module


# ------------------------------------------------------------------------------------------------
# Files of tensors


def open_safetensors(path: Path):
    """A file, mapped for as long as a block is copied: touched pages count as memory until then.

    Raises CheckpointError.
    """
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a complete safetensors file ({why})") from None


def open_pickle(path: Path) -> dict[str, Tensor]:
    """A file of Meta's, mapped into memory; nothing that it holds is executed.

    Raises CheckpointError.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class|function) (\S+)", str(error))
        what = found[1] if found else "something"
        raise CheckpointError(f"{path}: holds {what} where only tensors may be") from None
    except Exception as error:      # a damaged archive shows itself in many ways
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a complete file of tensors ({why})") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not tensors by name")
    for key, tensor in tensors.items():
        is_tensor = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(key, str) or not is_tensor:
            raise CheckpointError(f"{path}: {key} is not a tensor")
    return tensors


def read_safetensors(folder: Path) -> Weights:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names.

    Raises CheckpointError.
    """
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return Weights(path, tensors_of(path, None, index))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(
            isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index}: weight_map is not an object of tensors and their files")
    tensors = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: weight_map names {file!r}, which is not a file of "
                                  "this folder")
        promised = {key for key in places if places[key] == file}
        tensors |= tensors_of(folder / file, promised, index)
    return Weights(index, tensors)


def tensors_of(path: Path, promised: set[str] | None, index: Path) -> dict[str, Stored]:
    """The tensors of one file; promised: those that the index says it has. CheckpointError."""
    tensors = {}
    with open_safetensors(path) as opened:
        keys = set(opened.keys())
        for key in sorted(keys - (keys if promised is None else promised)):
            raise CheckpointError(f"{path}: {key} is not in {index.name}")
        for key in sorted((promised or set()) - keys):
            raise CheckpointError(f"{path}: no tensor {key}, which {index.name} places here")
        for key in keys:
            part = opened.get_slice(key)
            read = lambda start, stop, key=key: rows_of(path, key, start, stop)
            tensors[key] = Stored(path, tuple(part.get_shape()), FLOATS.get(part.get_dtype()), read)
    return tensors


def rows_of(path: Path, key: str, start: int, stop: int) -> Tensor:
    with open_safetensors(path) as opened:
        return opened.get_slice(key)[start:stop]


# ------------------------------------------------------------------------------------------------
# Writing


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
    refusal = [why_not(folder, partial, tokenizer_file) if writes else None]
    if dist.is_initialized():
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise InputError(refusal[0])
    if writes:
        partial.mkdir(parents=True, exist_ok=True)
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
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
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
        if path.is_dir() and any(path.iterdir()) and not is_own(path):
            return (f"{path}: holds something, and is not a model's folder of ours: take another "
                    "name, or empty it")
    return None


def is_own(folder: Path) -> bool:
    """Whether train.py or `save` made a folder: what they wrote last, or first, is there."""
    try:
        if (folder / "config.json").exists():
            return read_json(folder / "config.json").get("model_type") == "alignvlm"
        return all(OWN_FILES.fullmatch(path.name) or path.name.startswith("step-")
                   for path in folder.iterdir())
    except CheckpointError:
        return False


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
