"""Folders that Megatron and MindSpeed train into: a model in parts, one for each rank, put together as it is read.

An iteration (`iter_0001000`, or `release`) has a folder for each rank, `mp_rank_TT` or `mp_rank_TT_PPP`. The
tensor-parallel ranks (TT) hold slices of the large matrices, the pipeline ranks (PPP) some of the blocks, which each
numbers from 0.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.weights.files import WeightImportError, open_checkpoint
from osp.weights.lazy import Stored, Weights, holds_tensors, unwrapped

_FILE = "model_optim_rng.pt"
_LATEST = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d+)")
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_AVERAGED, _PLAIN = "ema_model", "model"

# The dimension along which tensor-parallel ranks split a tensor: the output of widening layers, the input of others.
_SPLIT = (
    (0, re.compile(r"transformer_blocks\..+\.(to_[qkv]|add_[qkv]_proj|ff(_enc)?\.net\.0\.proj)\.(weight|bias)")),
    (1, re.compile(r"transformer_blocks\..+\.(to_out\.0|to_add_out|ff(_enc)?\.net\.2)\.weight")),
)
_BLOCKS = "transformer_blocks"
_SKIPS = re.compile(r"(skip_norm_linear(?:_enc)?)\.(\d+)\.(.+)")


def iteration_folder(folder: Path) -> Path | None:
    """The folder with the ranks: this one or an iteration in it; None if there are no ranks.

    Of several iterations it is the one that `latest_checkpointed_iteration.txt` names, else the last; `release` comes
    before the first. Raises WeightImportError if that file names one that is not there.
    """
    if _ranks(folder):
        return folder
    found: dict[int, Path] = {}
    for child in sorted(folder.iterdir()):
        match = _ITERATION.fullmatch(child.name)
        if (match or child.name == _RELEASE) and child.is_dir() and _ranks(child):
            found[int(match[1]) if match else -1] = child
    latest = folder / _LATEST
    if not found or not latest.is_file():
        return found[max(found)] if found else None
    text = latest.read_text("utf-8", "replace").strip()
    number = -1 if text == _RELEASE else int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
    if number not in found:
        names = ", ".join(child.name for child in found.values())
        raise WeightImportError(f"{latest}: names {text[:40]!r}, which is not beside it; give one of {names} as source")
    return found[number]


def read_ranks(folder: Path, num_layers: Any = None) -> Weights:
    """The whole model of an iteration's folder; tensors are put together when they are asked for.

    `num_layers`, the published setting (the number of blocks, or a list with that of each stage), says where a block
    belongs; it is needed only for several pipeline ranks. Averaged weights (`ema_model`) come first.
    Raises WeightImportError naming a rank or file that is missing or damaged, and for parts that make no whole.
    """
    folders = _ranks(folder)
    tensor_ranks, pipeline_ranks = (1 + max(rank[i] for rank in folders) for i in (0, 1))
    every = ((rank, stage) for rank in range(tensor_ranks) for stage in range(pipeline_ranks))
    if (missing := next((rank for rank in every if rank not in folders), None)) is not None:
        raise WeightImportError(f"{folder / _name(missing, folders)}: no such folder; the part of that rank is missing")
    parts = _parts({rank: path / _FILE for rank, path in folders.items()})
    stages = [
        _joined({folders[rank]: part for rank, part in parts.items() if rank[1] == stage})
        for stage in range(pipeline_ranks)
    ]
    return stages[0] if pipeline_ranks == 1 else _renumbered(stages, num_layers, folder)


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    """The folders of the ranks in order, by tensor-parallel and pipeline rank."""
    found: dict[tuple[int, int], Path] = {}
    for child in folder.iterdir():
        if (match := _RANK.fullmatch(child.name)) and child.is_dir():
            rank = int(match[1]), int(match[2] or 0)
            if rank in found:
                raise WeightImportError(f"{child}: {found[rank].name} beside it is the same rank; move one away")
            found[rank] = child
    return dict(sorted(found.items()))


def _name(rank: tuple[int, int], folders: Mapping[Any, Path]) -> str:
    """The name of a rank's folder, spelled as these are."""
    has_stage = any(path.name.count("_") > 2 for path in folders.values())
    return f"mp_rank_{rank[0]:02d}" + (f"_{rank[1]:03d}" if has_stage else "")


def _parts(files: Mapping[tuple[int, int], Path]) -> dict[tuple[int, int], Weights]:
    """The weights of each rank; averaged weights if any rank has them, and then all ranks must."""
    loaded = {rank: open_checkpoint(file) for rank, file in files.items()}
    averaged = {rank: holds_tensors(checkpoint.get(_AVERAGED)) for rank, checkpoint in loaded.items()}
    entry = _AVERAGED if any(averaged.values()) else _PLAIN
    parts = {}
    for rank, checkpoint in loaded.items():
        inner = checkpoint.get(entry)
        parts[rank] = unwrapped(inner) if isinstance(inner, Mapping) else Weights({})
        if not parts[rank]:
            raise WeightImportError(
                f"{files[rank]}: holds no weights under {entry}"
                + (", as other ranks do" if any(averaged.values()) else f" or {_AVERAGED}")
            )
    return parts


def _joined(ranks: Mapping[Path, Weights]) -> Weights:
    """The tensor-parallel ranks of one pipeline rank."""
    first, *others = ranks
    for other in others:
        if odd := sorted(ranks[first].keys() ^ ranks[other].keys()):
            raise WeightImportError(f"{other}: only it or {first.name} holds {', '.join(odd[:5])}")
    return Weights({key: _whole(key, {path: part.stored[key] for path, part in ranks.items()}) for key in ranks[first]})


def _whole(key: str, parts: Mapping[Path, Stored]) -> Stored:
    """A tensor of its slices, or the first of copies."""
    first, *_ = parts.values()
    dim = next((dim for dim, pattern in _SPLIT if pattern.fullmatch(key)), None)
    for path, part in parts.items():
        if dim is None:
            fits = part.shape == first.shape
        else:
            fits = dim < len(part.shape) and _without(part.shape, dim) == _without(first.shape, dim)
        if not fits:
            name = next(iter(parts)).name
            raise WeightImportError(f"{path}: {key} is {part.shape}, which does not go with {first.shape} of {name}")
    if dim is None or len(parts) == 1:
        return first
    size = sum(part.shape[dim] for part in parts.values())
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    return Stored(shape, first.dtype, partial(_concatenated, list(parts.values()), dim))


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _concatenated(parts: Sequence[Stored], dim: int) -> Tensor:
    return torch.cat([part.read() for part in parts], dim)


def _renumbered(ranks: Sequence[Weights], num_layers: Any, folder: Path) -> Weights:
    """The blocks and long skips of all pipeline ranks in one sequence; of what several ranks have, the first's."""
    sizes = [num_layers] if isinstance(num_layers, int) else num_layers
    if not isinstance(sizes, list | tuple) or not all(isinstance(size, int) for size in sizes):
        raise WeightImportError(
            f"{folder}: holds {len(ranks)} pipeline ranks, which need num_layers of the published settings to be put "
            f"together; it is {num_layers!r}"
        )
    if isinstance(num_layers, int):
        blocks, names = re.compile(rf"({_BLOCKS})\.(\d+)\.(.+)"), [str(block) for block in range(num_layers)]
    else:
        blocks = re.compile(rf"({_BLOCKS})\.(\d+)\.(\d+)\.(.+)")
        names = [f"{stage}.{block}" for stage, size in enumerate(sizes) for block in range(size)]

    # A place is a rank and the number, or numbers, in its list.
    places: dict[str, set[tuple[int, ...]]] = {_BLOCKS: set()}
    parts: list[tuple[Stored, str, tuple[int, ...], str]] = []
    merged: dict[str, Stored] = {}
    for rank, weights in enumerate(ranks):
        for key, stored in weights.stored.items():
            if match := blocks.fullmatch(key) or _SKIPS.fullmatch(key):
                which, *numbers, rest = match.groups()
                place = (rank, *map(int, numbers))
                places.setdefault(which, set()).add(place)
                parts.append((stored, which, place, rest))
            else:
                merged.setdefault(key, stored)
    if len(places[_BLOCKS]) != len(names):
        raise WeightImportError(
            f"{folder}: its {len(ranks)} pipeline ranks hold {len(places[_BLOCKS])} blocks, but "
            f"num_layers={num_layers} makes {len(names)}; give config={{num_layers: ...}} as it was trained"
        )
    order = {which: {place: i for i, place in enumerate(sorted(found))} for which, found in places.items()}
    for stored, which, place, rest in parts:
        index = order[which][place]
        merged[f"{which}.{names[index] if which == _BLOCKS else index}.{rest}"] = stored
    return Weights(merged)
