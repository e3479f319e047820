"""Tensors by name that are read when they are asked for."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from osp.checks import check_choice

Model = TypeVar("Model", bound=nn.Module)

_UNREAD = "_unread_weights"

# Where a training checkpoint keeps its weights; the averaged ones come first.
_WRAPPERS = ("ema_state_dict", "ema_model", "state_dict", "gen_model", "model")

# The dtypes that weights are kept in, by name.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is asked for; its shape and dtype are known before.

    `part(begin, end)` reads the rows between alone, where a file lets them be read so.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    part: Callable[[int, int], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """A tensor that is in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach, lambda begin, end: tensor.detach()[begin:end])

    def rows(self, begin: int, end: int) -> Tensor:
        """The rows from `begin` to before `end`, counted along the first dimension."""
        return self.read()[begin:end] if self.part is None else self.part(begin, end)


class Opened(Mapping[str, Any]):
    """Values by name, some of which are tensors, or hold some, that are read when they are asked for."""

    @abstractmethod
    def peek(self, key: Any) -> Any:
        """The value of a key as by indexing, but a Stored for a tensor that has not been read."""

    def __getitem__(self, key: str) -> Any:
        value = self.peek(key)
        return value.read() if isinstance(value, Stored) else value


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read when they are asked for, so that there need never be all of them in memory.

    What comes may lie in a mapped file or be somebody else's tensor: copy what is to stay.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Weights":
        """The tensors among these values, by the same keys; other values are left out."""
        if isinstance(values, Weights):
            return values
        stored = {str(key): Stored.of(value) if isinstance(value, Tensor) else value for key, value in _peeked(values)}
        return cls({key: value for key, value in stored.items() if isinstance(value, Stored)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each, without reading it."""
        return {key: stored.shape for key, stored in self.stored.items()}

    def without(self, beginnings: tuple[str, ...]) -> "Weights":
        """Those whose keys begin with none of these."""
        return Weights({key: one for key, one in self.stored.items() if not key.startswith(beginnings)})

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def filled(model: Model, weights: Weights, copy: bool = True) -> Model:
    """A model without memory -> with copies of these weights, in its own types, in eval mode.

    Without `copy` weights that are of the right type become its own: those that no file holds.

    Under `torch.device("meta")` it stays without memory, and they are read later: `unread` has them.
    """
    if torch.get_default_device().type == "meta":
        model.__dict__[_UNREAD] = weights
        return model.eval()
    wanted = model.state_dict()
    # One after another, so that there is one copy; the files may change afterwards.
    own = {key: value.to(wanted[key].dtype, copy=copy) for key, value in weights.items()}
    model.load_state_dict(own, assign=True)
    return model.eval()


def unread(model: nn.Module) -> Weights | None:
    """The weights of a model that `filled` has left without memory; None for another."""
    found: Weights | None = model.__dict__.get(_UNREAD)
    return found


def take_unread(model: nn.Module) -> Weights | None:
    """As `unread`, for whoever reads them now: the model has none any more."""
    found: Weights | None = model.__dict__.pop(_UNREAD, None)
    return found


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """One of the types that weights are kept in, or its name. Raises UsageError for another."""
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, _DTYPES)
    return _DTYPES[name]


def unwrapped(loaded: Mapping[str, Any]) -> Weights:
    """The weights in a training checkpoint, or in a state dict.

    They lie under `ema_state_dict` or `ema_model` (preferred unless empty), `state_dict`, `gen_model` or `model`, also
    one in another; the prefix `module.` is dropped, and so is what is no tensor (as Megatron's `*_extra_state`).
    """
    weights = loaded
    for _ in _WRAPPERS:
        inner = (weights[name] for name in _WRAPPERS if name in weights and holds_tensors(_peek(weights, name)))
        weights = next(inner, weights)
    return Weights({key.removeprefix("module."): stored for key, stored in Weights.of(weights).stored.items()})


def holds_tensors(value: Any, depth: int = len(_WRAPPERS)) -> bool:
    """Whether a value is a mapping with tensors, or with mappings that have some, so many levels deep."""
    if not isinstance(value, Mapping) or not depth:
        return False
    return any(isinstance(inner, Tensor | Stored) or holds_tensors(inner, depth - 1) for _, inner in _peeked(value))


def _peeked(values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return ((key, _peek(values, key)) for key in values)


def _peek(values: Mapping[Any, Any], key: Any) -> Any:
    """A value of a mapping; of a tensor that is read when it is asked for, what is known before."""
    if isinstance(values, Weights):
        return values.stored[key]
    return values.peek(key) if isinstance(values, Opened) else values[key]
