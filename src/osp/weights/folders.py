"""Weights as people have them: one file, a folder with its `config.json`, shards with an index, or ranks."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from osp.documents import read_json as read_document
from osp.errors import DataError, UsageError
from osp.files import write_whole
from osp.weights.files import WeightImportError, open_checkpoint, save_weights
from osp.weights.lazy import Stored, Weights, unwrapped
from osp.weights.megatron import iteration_folder, read_ranks

CONFIG = "config.json"
CHECKSUMS, SEAL = "checksums", "sha256"
"""Entries of our own `config.json`: the checksum of each tensor, and the digest of what the file says."""
_INDEX = ".index.json"
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def read_weights(source: str | Path, num_layers: Any = None) -> Weights:
    """The weights of a file or folder, without what a training checkpoint wraps around them.

    A folder holds `*.safetensors` (preferred) or one torch file, or shards of either with a `*.index.json`, or what
    Megatron trains into (`osp.weights.megatron`, which `num_layers` is for).
    Raises WeightImportError naming what is missing, damaged, or one of several.
    """
    path = Path(source)
    if path.is_dir():
        if (iteration := iteration_folder(path)) is not None:
            return read_ranks(iteration, num_layers)
        path = _weight_file(path)
    elif not path.exists():
        raise WeightImportError(f"{path}: no such file or folder")
    loaded = _read_shards(path) if path.name.endswith(_INDEX) else open_checkpoint(path)
    weights = unwrapped(loaded)
    if not weights:
        raise WeightImportError(f"{path}: holds no tensors by name")
    return weights


def read_config(source: str | Path) -> dict[str, Any] | None:
    """The settings in the `config.json` of a folder, or beside a file; None if there is no such file.

    Raises WeightImportError if it is not a JSON object.
    """
    path = config_path(source)
    return read_json(path) if path.is_file() else None


def config_path(source: str | Path) -> Path:
    """Where the configuration of a weight file or folder is, if it has one."""
    path = Path(source)
    return (path if path.is_dir() else path.parent) / CONFIG


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightImportError naming the file if it holds anything else."""
    try:
        loaded = read_document(path)
    except FileNotFoundError as error:
        raise WeightImportError(f"{path}: No such file") from error
    except (DataError, OSError) as error:
        raise WeightImportError(f"{path}: not readable as JSON ({str(error).removeprefix(f'{path}: ')})") from error
    if not isinstance(loaded, dict):
        raise WeightImportError(f"{path}: holds a JSON {type(loaded).__name__}, not an object")
    return loaded


def write_model(
    folder: Path,
    weights_name: str,
    weights: Weights,
    config: Mapping[str, Any],
    is_alike: Callable[[Mapping[str, Any]], bool],
    seals: bool = False,
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write weights and `config.json` into a folder; the one that is written last makes it complete.

    A model of the same kind (`is_alike`, asked with its configuration) is replaced. With `seals` the configuration gets
    checksums of the tensors and of itself, which published configurations do not have. `beside` writes what else the
    folder holds, of the file of weights.
    Raises UsageError for a folder that holds another's `config.json` or weights of this name.
    """
    config_file, weight_file = folder / CONFIG, folder / weights_name
    if config_file.exists():
        if not is_alike(read_json(config_file)):
            raise UsageError(f"{config_file} is of something else; choose another output folder")
    elif weight_file.exists():
        raise UsageError(f"{weight_file} is there already, without a {CONFIG}; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{weights_name}.part"
    try:
        checksums = save_weights(part, weights)
        # Old settings must never stand beside new weights.
        config_file.unlink(missing_ok=True)
        os.replace(part, weight_file)
        beside(weight_file)
    finally:
        part.unlink(missing_ok=True)
    config = sealed({**config, CHECKSUMS: checksums}) if seals else config
    write_whole(config_file, json.dumps(config, indent=2))


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the digest of its entries."""
    return {**config, SEAL: _digest(config)}


def check_seal(config: Mapping[str, Any], place: str) -> None:
    """Raise WeightImportError if a configuration with checksums is not what was written; old ones have none."""
    if SEAL not in config and CHECKSUMS not in config:
        return
    if config.get(SEAL) != _digest(config):
        raise WeightImportError(
            f"{place}: is not what was written; its digest is another. Import or copy the folder again; whoever has "
            f"changed it on purpose deletes {CHECKSUMS} and {SEAL}"
        )


def _digest(config: Mapping[str, Any]) -> str:
    # The model's name is one of a few, and may have changed.
    content = {key: value for key, value in config.items() if key not in (SEAL, "model")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _weight_file(folder: Path) -> Path:
    """The file that holds a folder's weights, or the index of its shards."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        indices = [path for path in files if path.name.endswith(tuple(suffix + _INDEX for suffix in suffixes))]
        shards = {name for index in indices for name in _weight_map(index).values()}
        found = indices + [path for path in files if path.suffix in suffixes and path.name not in shards]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise WeightImportError(f"{folder}: holds several weight files; name one of {names}")
        if found:
            return found[0]
    kinds = f".safetensors, {', '.join(TORCH_SUFFIXES)}, shards with an index, or mp_rank_* folders"
    below = _folders_below(folder)
    hint = f"; there are some in {' and '.join(map(str, below))}: give that folder" if below else ""
    raise WeightImportError(f"{folder}: holds no weights ({kinds}){hint}")


def _folders_below(folder: Path) -> list[Path]:
    """The first folders below this one, three levels deep, that hold weight files."""
    found: list[Path] = []
    for depth in range(1, 4):
        for path in islice(sorted(folder.glob("*/" * depth)), 200):
            suffixes = {child.suffix for child in islice(path.iterdir(), 1000) if child.is_file()}
            if suffixes & {".safetensors", *TORCH_SUFFIXES}:
                found.append(path)
            if len(found) == 3:
                return found
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightImportError(f"{index}: has no weight_map from keys to files")
    for name in weight_map.values():
        if name in ("", ".", "..") or "\\" in name or Path(name).name != name:
            raise WeightImportError(f"{index}: names the shard {name!r}; a shard lies beside its index")
    return weight_map


def _read_shards(index: Path) -> Weights:
    weight_map = _weight_map(index)
    merged: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        shard = open_checkpoint(index.parent / name)
        if twice := sorted(merged.keys() & shard.keys()):
            raise WeightImportError(f"{index}: {name} and another shard hold {', '.join(twice[:5])}")
        absent = [key for key, owner in weight_map.items() if owner == name and key not in shard]
        if absent:
            raise WeightImportError(f"{index}: {name} lacks {', '.join(absent[:5])}")
        merged |= Weights.of(shard).stored
    return Weights(merged)
