"""Newly drawn weights of a model that never lies in memory whole, the same as if it were built at once.

A model draws its weights one after another from one stream of random numbers, some of them twice, and may compute them
from each other. So its making is recorded, on the meta device: what was done to which memory, and where the stream of
random numbers stood. Each tensor can then be made again by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from osp.weights.lazy import Stored, Weights

_OVERWRITE = {"aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_"}
"""Operations that leave nothing of what a tensor held."""


def drawn_weights(make: Callable[[], nn.Module]) -> Weights:
    """The weights and buffers that `make` would draw now on the CPU, each made when it is asked for.

    The stream of random numbers stands afterwards where it would stand if the model had been made. All numbers are
    drawn once for that, a tensor at a time, and those of a tensor again when it is asked for.
    """
    with torch.device("meta"), _Constants(), Recorder() as recorder:
        model = make()
    return Weights(
        {
            key: Stored(tuple(value.shape), value.dtype, partial(recorder.value, value))
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }
    )


@dataclass(frozen=True)
class _Done:
    """One operation that made the memory `target` or changed it, from what `sources` held."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    target: int
    sources: frozenset[int]
    makes: bool
    overwrites: bool
    drawn_from: Tensor | None


class Recorder(TorchDispatchMode):
    """Notes what is done to tensors on the meta device, and draws the random numbers that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[_Done] = []
        self._kept: list[Tensor] = []  # or their memory's number might be another's later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked for, and note it."""
        options = kwargs or {}
        result = func(*args, **options)
        if not isinstance(result, Tensor) or not result.is_meta:
            return result
        if func._schema.name == "aten::empty_like":  # takes nothing of what the other holds
            func, args = torch.ops.aten.empty_strided.default, (result.shape, result.stride())
            options = {"dtype": result.dtype, "device": result.device}
        sources = frozenset(_memory(one) for one in tree_leaves((args, options)) if _is_meta(one))
        target, changes = _memory(result), func._schema.is_mutable
        if target in sources and not changes:
            return result  # a view
        draws = torch.Tag.nondeterministic_seeded in func.tags
        state = torch.get_rng_state() if draws else None
        self._kept.append(result)
        whole = result.numel() * result.element_size() == result.untyped_storage().nbytes()
        overwrites = whole and func._schema.name in _OVERWRITE
        self._done.append(
            _Done(func, args, options, target, sources - {target}, target not in sources, overwrites, state)
        )
        if draws:
            self._advance(func, args, options)
        return result

    def _advance(self, function: Any, arguments: Any, options: Any) -> None:
        real = partial(tree_map_only, Tensor, lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype))
        function(*real(arguments), **_on_cpu(real(options)))

    @torch.no_grad()
    def value(self, tensor: Tensor) -> Tensor:
        """The values that a tensor of the recorded model has, on the CPU."""
        if not tensor.is_meta:
            return tensor
        memory: dict[int, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            for done in self._needed(_memory(tensor)):
                if done.drawn_from is not None:
                    torch.set_rng_state(done.drawn_from)
                real = partial(tree_map_only, Tensor, partial(_real, memory))
                result = done.function(*real(done.arguments), **_on_cpu(real(done.options)))
                if done.makes:
                    memory[done.target] = result
        return _real(memory, tensor)

    def _needed(self, target: int) -> list[_Done]:
        """All that was done to make what this memory holds, in order."""
        chosen: list[_Done] = []
        wanted = {target: True}  # whether its values are wanted, or only the memory
        for done in reversed(self._done):
            if not wanted.get(done.target, False) and not (done.target in wanted and done.makes):
                continue
            chosen.append(done)
            if done.makes:
                del wanted[done.target]
            elif done.overwrites:
                wanted[done.target] = False
            wanted |= dict.fromkeys(done.sources, True)
        assert not wanted, "a weight was made out of sight"
        return chosen[::-1]


class _Constants(TorchFunctionMode):
    """Makes tensors of given numbers on the CPU, where these are not lost."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        return func(*args, **(options | {"device": "cpu"} if func is torch.tensor else options))


def _memory(tensor: Tensor) -> int:
    """The number of the memory that a tensor lies in; views of it have the same one."""
    return tensor.untyped_storage()._cdata


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _real(memory: dict[int, Tensor], tensor: Tensor) -> Tensor:
    """The tensor with values, where it was recorded without."""
    if not tensor.is_meta:
        return tensor
    return memory[_memory(tensor)].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"device": torch.device("cpu")} if "device" in options else options
