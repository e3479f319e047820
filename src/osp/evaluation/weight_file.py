"""Weights of the metric networks: a flat state dict in a file, read without running code, checked key by key."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from osp.errors import DataError


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or one of `torch.save` (read with `weights_only=True`), on the CPU.

    Raises:
        DataError: the file is missing, is no weight file, or holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not a readable weight file ({reason})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: holds no flat state dict (tensors by name)")
    return dict(state)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict; unlike `strict=True` the error is one line, and BatchNorm's step counter may be absent.

    Raises:
        DataError: names the missing, unknown and misshapen keys.
    """
    wanted = module.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # files from before torch 0.4.1 lack them
    problems = [
        *(f"missing {key}" for key in wanted if key not in state and key not in counters),
        *(f"unknown {key}" for key in state if key not in wanted),
        *(
            f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
            for key in wanted
            if key in state and state[key].shape != wanted[key].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{source}: not the weights of {type(module).__name__}: {', '.join(problems[:5])}{more}")
    # `assign` also fills a module that was built without memory (on the meta device)
    module.load_state_dict({key: state.get(key, wanted[key]) for key in wanted}, assign=True)
