"""Weights on disk: a folder's settings and tensors, read block by block into a module, and written.

A tensor is a `Stored`, of which nothing is read before it is asked for; `load` builds a module without memory and reads
into place, of a sharded one only this rank's rows. Here is also what bad input raises, as everything imports this.
"""
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plumbing.settings import CheckpointError, read_json

BLOCK_BYTES = 32 * 2 ** 20      # what is copied at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Stored:
    """A tensor in a file: rows(start, stop) reads that part of it, and nothing is read before."""
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None               # None: not a floating-point one
    rows: Callable[[int, int], Tensor]

    def equals(self, other: "Stored | None") -> bool:
        """Whether another matrix is the same, without reading more than it takes to tell."""
        return other is not None and self.shape == other.shape and self.dtype == other.dtype and all(
            torch.equal(self.rows(i, i + 4096), other.rows(i, i + 4096)) for i in range(0, self.shape[0], 4096))


@dataclass
class Weights:
    """The tensors of a folder, and how the parameters of a module are called there."""
    path: Path                              # the file that lists the tensors
    tensors: dict[str, Stored]
    key: Callable[[str], str] = str         # a parameter's name -> its tensor's
    ignored: str = "$^"                     # a pattern: tensors that the module has no use for

    def part(self, name: str) -> "Weights":
        """Those of one submodule of a folder that holds a model of ours."""
        return Weights(self.path, self.tensors, lambda of_part: f"{name}.{of_part}", rf"(?!{name}\.).*")

    def check(self, module: nn.Module) -> list[torch.dtype]:
        """The dtypes of the module's tensors. Raises CheckpointError if one is missing, unexpected or mis-shaped."""
        expected = {self.key(name): tuple(p.shape) for name, p in module.named_parameters()}
        for key in expected:
            if key not in self.tensors:
                raise CheckpointError(f"{self.path}: no tensor {key}, which the configuration asks for")
        for key, stored in self.tensors.items():
            if key not in expected:
                if not re.fullmatch(self.ignored, key):
                    raise CheckpointError(f"{stored.path}: unexpected tensor {key}, no part of the configuration")
            elif stored.dtype is None:
                raise CheckpointError(f"{stored.path}: {key} does not hold floating-point numbers: quantised?")
            elif stored.shape != expected[key]:
                raise CheckpointError(f"{stored.path}: {key} has shape {list(stored.shape)}, "
                                      f"the configuration asks for {list(expected[key])}")
        return [self.tensors[key].dtype for key in expected]

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Copy the tensors into the module's parameters, block by block; of a sharded one only this rank's rows."""
        for name, p in module.named_parameters():
            stored = self.tensors[self.key(name)]
            here, first = own_rows(p)
            step = max(1, BLOCK_BYTES // (p.element_size() * math.prod(p.shape[1:])))
            for start in range(0, len(here), step):
                block = here[start:start + step]
                block.copy_(stored.rows(first + start, first + start + len(block)))


def own_rows(p: nn.Parameter) -> tuple[Tensor, int]:
    """The part of a parameter that this rank holds and its first row: all of it, unless FSDP2 has sharded it."""
    if not hasattr(p, "to_local"):
        return p, 0
    mesh = p.device_mesh        # its last dimension shards, one before it replicates
    chunk = -(-p.shape[0] // mesh.size(-1))             # dim 0 in equal chunks, the last ones shorter or empty
    return p.to_local(), mesh.get_coordinate()[-1] * chunk


def load(build: Callable[[], nn.Module], parts: dict[str, Weights], dtype: torch.dtype | None, device,
         shard: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Build a module on the meta device and read its parts' weights into place; there is never a second copy.

    parts: submodule -> its weights ("" is the module itself). dtype None keeps the stored one. shard: what cuts the
    module among ranks (FSDP2's fully_shard) before it has memory, so that no rank holds or reads more than its part.
    """
    with torch.device("meta"):
        module = build()
    dtypes = [dtype for name, weights in parts.items() for dtype in weights.check(module.get_submodule(name))]
    module.to(dtype or reduce(torch.promote_types, dtypes))
    if shard is not None:
        shard(module)
    module.to_empty(device=device)
    for name, weights in parts.items():
        weights.fill(module.get_submodule(name))
    return module


def open_safetensors(path: Path):
    """A file is mapped for as long as a block is copied: pages that were touched count as memory until then."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({' '.join(str(error).split())})") from None


def open_pickle(path: Path) -> dict[str, Tensor]:
    """A file of Meta's, mapped into memory; nothing that it holds is executed."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global|class|function) (\S+)", str(error))
        raise CheckpointError(f"{path}: holds {what[1] if what else 'something'} where only tensors may be") from None
    except Exception as error:      # a damaged archive shows itself in many ways
        raise CheckpointError(f"{path}: not a complete file of tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {key} is not a tensor")
    return tensors


def read_safetensors(folder: Path) -> Weights:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        files = {path.name: None}
    else:
        path, places = index, read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise CheckpointError(f"{index}: weight_map is not an object of tensors and their files")
        files = {file: {key for key in places if places[key] == file} for file in sorted(set(places.values()))}
    tensors = {}
    for file, promised in files.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: weight_map names {file!r}, which is not a file of this folder")
        with open_safetensors(folder / file) as opened:
            keys = set(opened.keys())
            for key in sorted(keys ^ (keys if promised is None else promised)):
                raise CheckpointError(f"{folder / file}: " + (f"{key} is not in {index.name}" if key in keys else
                                                              f"no tensor {key}, which {index.name} places here"))
            for key in keys:
                part = opened.get_slice(key)
                tensors[key] = Stored(folder / file, tuple(part.get_shape()), FLOATS.get(part.get_dtype()),
                                      lambda start, stop, file=folder / file, key=key: rows_of(file, key, start, stop))
    return Weights(path, tensors)


def rows_of(path: Path, key: str, start: int, stop: int) -> Tensor:
    with open_safetensors(path) as opened:
        return opened.get_slice(key)[start:stop]


@torch.no_grad()
def save(model: nn.Module, config: dict, folder: Path, tokenizer_file: Path, dtype: torch.dtype,
         shard_bytes: int) -> None:
    """Write config.json, safetensors and the tokenizer's file beside `folder`, then rename: complete or not there.

    Over shard_bytes the tensors go to several files with an index. Of a sharded model (FSDP2) every rank calls this,
    the first one writes, and of the whole model it holds one file's tensors at a time.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        partial.mkdir(parents=True, exist_ok=True)
        for old in partial.glob("model*.safetensors*"):
            old.unlink()
    files, size = [[]], 0
    state = model.state_dict()
    for name, p in state.items():
        if files[-1] and size + p.numel() * dtype.itemsize > shard_bytes:
            files, size = [*files, []], 0
        files[-1].append(name)
        size += p.numel() * dtype.itemsize
    file_names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for file, names in zip(file_names, files):
        tensors = {}
        for name in names:
            p = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
            if writes:
                tensors[name] = p.to("cpu", dtype).contiguous()
        if writes:
            save_file(tensors, partial / file, metadata={"format": "pt"})
    if writes:
        if len(files) > 1:
            places = {name: file for file, names in zip(file_names, files) for name in names}
            size = sum(p.numel() for p in state.values()) * dtype.itemsize
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if tokenizer_file.parent != partial:
            shutil.copyfile(tokenizer_file, partial / tokenizer_file.name)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in file_names:         # save_file lets nobody but its owner read them
            shutil.copymode(partial / "config.json", partial / file)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)      # a kill at any moment leaves one complete folder, here or in .old
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
