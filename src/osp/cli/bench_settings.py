"""What the targets of `osp bench` have in common: how they read and check their settings."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from osp.errors import UsageError

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
# What says where weights are, the choice of model that reads it, and what it is
_SOURCES = (("checkpoint", "trained", "FILE of `osp train`"), ("path", "pretrained", "FOLDER"))


def weights_dtype(precision: str) -> torch.dtype:
    """What the weights are stored in."""
    return PRECISIONS[precision] if precision.endswith("true") else torch.float32


def configuration(cfg: DictConfig, group: str) -> str:
    """The model that `group` configures, as JSON.

    Raises UsageError where it needs a setting that is missing, or does not read one that is given.
    """
    choice = chosen(group)
    for key, reader, what in _SOURCES:
        if cfg.get(key) is not None and choice != reader:
            raise UsageError(f"{key}={cfg[key]} is not read with {group}={choice}; give {group}={reader} too")
        if key in cfg and cfg[key] is None and choice == reader:
            raise UsageError(f"{group}={choice} needs {key}={what}")
    if missing := sorted(OmegaConf.missing_keys(cfg[group])):
        raise UsageError(f"{group}={choice} needs {' and '.join(f'{key}=...' for key in missing)}")
    return json.dumps(OmegaConf.to_container(cfg[group], resolve=True))


def chosen(group: str) -> str:
    """The configuration that was chosen of a group."""
    return str(HydraConfig.get().runtime.choices[group])


def origin(config: Mapping[str, Any]) -> str | None:
    """Where a model's weights come from; None: they are random."""
    return config.get("path") or config.get("source")


def title(cfg: DictConfig, group: str, model: nn.Module) -> str:
    """What the model is."""
    config = cfg[group]
    source = origin(config)
    name = (
        f"{config.get('kind', type(model).__name__)} of {source}" if source else f"{chosen(group)} with random weights"
    )
    return f"{name}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def listed(cfg: DictConfig, key: str) -> list[Any]:
    """The values of a list, each once, or the only one. Raises UsageError if there is none."""
    value = cfg[key]
    values = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    values = values if isinstance(values, list) else [values]
    if not values:
        raise UsageError(f"{key}=[] leaves nothing to measure; give at least one value")
    return [one for i, one in enumerate(values) if one not in values[:i]]


def choices(cfg: DictConfig, key: str, known: tuple[Any, ...]) -> list[Any]:
    """The values of a list. Raises UsageError naming one that is not known."""
    values = listed(cfg, key)
    for value in values:
        if value not in known:
            raise UsageError(f"{key}={value} is not known; choose {', '.join(str(one).lower() for one in known)}")
    return values


def whole_number(key: str, value: Any, least: int = 1) -> int:
    """The value. Raises UsageError if it is no whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{key}={value} makes no sense; it must be a whole number of at least {least}")
    return value


def sides(key: str, value: Any, form: str, example: str) -> tuple[int, ...]:
    """`16x24` -> 16 and 24. Raises UsageError if it is not of the form, such as HEIGHTxWIDTH."""
    parts = str(value).split("x")
    if len(parts) != len(form.split("x")) or not all(re.fullmatch(r"0*[1-9][0-9]*", part) for part in parts):
        raise UsageError(f"{key}={value} makes no sense; give {form}, for example {example}")
    return tuple(map(int, parts))
