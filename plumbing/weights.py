"""Weights on disk: tensors that are read block by block into a module.

A tensor is a `Stored`, of which nothing is read before it is asked for. `load` builds a module
without memory and reads into place, of a sharded one only this rank's rows.
"""
import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plumbing.settings import CheckpointError, read_json

BLOCK_BYTES = 32 * 2 ** 20      # what is copied at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
