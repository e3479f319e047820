"""Tensors that are alive, and operations, followed through a computation; without memory too."""

import weakref
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

TENSORS = "tensors"
"""The kind of what is made while no other kind is set."""


class LiveBytes(TorchDispatchMode):
    """Follows the tensors made inside the block: `peak` is the most that was alive at once, in bytes.

    Works on the meta device and with fake tensors, where nothing is computed. What is made is of the `kind` that is set
    at the time. `now` are the bytes alive, and `kinds` those of each kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = TENSORS
        self.now = self.peak = 0
        self.kinds: Counter[str] = Counter()
        self._alive: dict[int, tuple[Any, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        if not _gives_views(func):
            for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._follow(leaf, func, args)
        self.peak = max(self.peak, self.now)
        return result

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor that was made inside as one of this kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            storage, before, size = self._alive[key]
            self._add(before, -size)
            self._alive[key] = storage, kind, size
            self._add(kind, size)

    def kind_of(self, func: Any, args: Any) -> str:
        """The kind of what an operation makes."""
        return self.kind

    def _follow(self, tensor: Tensor, func: Any, args: Any) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def gone(_: Any) -> None:
            _, kind, size = self._alive.pop(key)
            self._add(kind, -size)

        kind = self.kind_of(func, args)
        self._alive[key] = weakref.ref(storage, gone), kind, size
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.kinds[kind] += size
        self.now += size


@cache
def _gives_views(func: Any) -> bool:
    """Whether an operation gives what it was given: nothing new, also where that was made before anyone followed."""
    return any(one.alias_info is not None for one in func._schema.returns)


def flops_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """The operations of a product, a convolution or an attention, a multiply-add being two; 0 for anything else.

    The same as torch's own counter, and the CPU's fused attention besides.
    """
    if (count := flop_registry.get(func._overloadpacket)) is not None:
        return int(count(*args, **kwargs, out_val=result))
    if func is _ATTENTION:
        return int(sdpa_flop_count(*(one.shape for one in args[:3])))
    if func is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(one.shape for one in args[:4])))
    return 0


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
