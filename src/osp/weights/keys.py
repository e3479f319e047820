"""From our modules to the names, shapes and settings of published checkpoints, and back.

A tensor of ours is one published tensor, or several in one: the filters of a wavelet, query, key and value. All
published VAEs share their layers: a 3D convolution is wrapped once more (`.conv`), so is a layer norm (`.norm`), and a
2D convolution has no time dimension.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from osp.checks import check_choice
from osp.errors import UsageError
from osp.vae.layers import CausalConv3d, Downsample, GroupNorm, LayerNorm
from osp.weights.lazy import Stored, Weights


@dataclass(frozen=True)
class KeyPair:
    """One tensor of ours and the keys that hold it in a published checkpoint.

    Where there are several keys (a wavelet's filters, a fused projection) all have `published_shape`; ours is the stack
    of them, reshaped. `rows` holds for each key the order in which its rows (indices of dimension 0) stand in ours,
    `ours = published[rows]`, or None where the order is the same; empty, it is the same in all.
    """

    ours: str
    published: tuple[str, ...]
    published_shape: tuple[int, ...]
    rows: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def orders(self) -> tuple[tuple[int, ...] | None, ...]:
        """`rows`, with an entry for each published key."""
        return self.rows or (None,) * len(self.published)


@dataclass(frozen=True)
class Setting:
    """Our name of a published setting and, where these differ, our values (of each level, where there is a list)."""

    ours: str
    values: Mapping[str, Any] | None = None


def layer_pairs(
    model: nn.Module, published_name: Callable[[str], str], is_2d: Callable[[str, CausalConv3d], bool]
) -> Iterator[KeyPair]:
    """The weights and biases of all convolutions and norms of a VAE.

    `published_name` gives the published name of a module of ours, without wrappers; `is_2d` says whether a convolution
    is a 2D one there.
    """
    for name, module in model.named_modules():
        if isinstance(module, CausalConv3d):
            flat = is_2d(name, module)
            theirs = published_name(name) + ".conv" * (isinstance(module, Downsample) + (not flat))
            shape = tuple(module.weight.shape)
            yield KeyPair(f"{name}.weight", (f"{theirs}.weight",), (*shape[:2], *shape[3:]) if flat else shape)
            yield KeyPair(f"{name}.bias", (f"{theirs}.bias",), shape[:1])
        elif isinstance(module, LayerNorm | GroupNorm):
            theirs = published_name(name) + (".norm" if isinstance(module, LayerNorm) else "")
            for parameter in ("weight", "bias"):
                yield KeyPair(f"{name}.{parameter}", (f"{theirs}.{parameter}",), tuple(module.weight.shape))


def from_published(
    pairs: Iterable[KeyPair], published: Mapping[str, Tensor], model: nn.Module, dtype: torch.dtype
) -> Weights:
    """The state dict of ours with the values of a published one, whose keys and shapes have been checked.

    What is asked for is read then, and copied.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return Weights(
        {
            pair.ours: Stored(shapes[pair.ours], dtype, partial(_own, pair, published, shapes[pair.ours], dtype))
            for pair in pairs
        }
    )


def _own(pair: KeyPair, published: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    parts = zip(pair.published, pair.orders, strict=True)
    return torch.stack([_reordered(published[key].detach().to(dtype), rows) for key, rows in parts]).reshape(shape)


def to_published(pairs: Iterable[KeyPair], own: Weights) -> Weights:
    """A published state dict with the values of ours, which are read when they are asked for.

    They may lie in the memory of ours.
    """
    return Weights(
        {
            key: Stored(pair.published_shape, own.stored[pair.ours].dtype, partial(_published_part, pair, own, i))
            for pair in pairs
            for i, key in enumerate(pair.published)
        }
    )


def _published_part(pair: KeyPair, own: Weights, index: int) -> Tensor:
    part = own[pair.ours].detach().reshape(len(pair.published), *pair.published_shape)[index]
    rows = pair.orders[index]
    return part if rows is None else part[torch.tensor(rows, device=part.device).argsort()]


def _reordered(value: Tensor, rows: tuple[int, ...] | None) -> Tensor:
    return value if rows is None else value[torch.tensor(rows, device=value.device)]


def check_settings(
    model: str, published: Mapping[str, Any], known: Collection[str], same_in_all: Mapping[str, Any]
) -> None:
    """Raise UsageError for a setting that no published `model` has, or for a value where all have the same.

    Keys that begin with an underscore are of the framework that wrote the configuration.
    """
    for key, value in published.items():
        if key in same_in_all and value != same_in_all[key]:
            raise UsageError(
                f"{key}={value!r} is of no published {model}; all have {same_in_all[key]!r}; is kind=... the right one?"
            )
    known = {*known, *same_in_all}
    if unknown := [key for key in published if key not in known and not key.startswith("_")]:
        raise UsageError(
            f"a published {model} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}; "
            "is kind=... the right one?"
        )


def settings_from_published(table: Mapping[str, Setting], published: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for the published ones that the table names and the mapping holds.

    Raises UsageError naming a value that no published model has.
    """

    def ours(key: str, value: Any) -> Any:
        choices = table[key].values
        if choices is None:
            return value
        if not isinstance(value, str):
            return tuple(ours(key, part) for part in value)
        check_choice(key, repr(value), map(repr, choices))
        return choices[value]

    return {setting.ours: ours(key, published[key]) for key, setting in table.items() if key in published}


def settings_to_published(table: Mapping[str, Setting], own: Mapping[str, Any]) -> dict[str, Any]:
    """The published settings that the table names for ours, as their JSON files hold them."""

    def theirs(key: str, value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [theirs(key, part) for part in value]
        choices = table[key].values
        return value if choices is None else next(name for name, meaning in choices.items() if meaning == value)

    return {key: theirs(key, own[setting.ours]) for key, setting in table.items()}
