"""A denoiser that is larger than the device: each of its blocks is there only while it runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from osp.denoiser import Denoiser
from osp.devices.device import backend

# Blocks whose weights are on the device at once: one runs, one may not be done yet, one is on its way.
BLOCKS_ON_DEVICE = 3


@contextmanager
def offloaded(denoiser: Denoiser, device: torch.device) -> Iterator[None]:
    """Inside, the denoiser works on `device`, and the weights of its blocks stay in the CPU's memory.

    A block's weights are copied just before it runs and dropped after it. On an accelerator they lie in pinned memory,
    and those of the next block are copied meanwhile, on a stream of their own. What is not in a block is on the device
    all the time. Results are the same to the bit. Afterwards all weights are in the CPU's memory.
    """
    blocks = _Blocks(denoiser.blocks, device)
    inside = {id(tensor) for home in blocks.homes for tensor, _ in home}
    rest = [(tensor, tensor.data.cpu()) for tensor in _tensors(denoiser) if id(tensor) not in inside]
    hooks: list[Any] = []
    # Autocast would keep its copies of weights that are gone.
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        for tensor, home in rest:
            tensor.data = home.to(device)
        for index, block in enumerate(denoiser.blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, index=index: blocks.before(index)))
            hooks.append(block.register_forward_hook(lambda *_, index=index: blocks.after(index)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        blocks.clear()
        for tensor, home in rest:
            tensor.data = home
        torch.set_autocast_cache_enabled(cached)


class _Blocks:
    """The weights of blocks that run one after another, again and again."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self.stream = None if device.type == "cpu" else backend(device).Stream(device)
        self.homes = [[(tensor, self._home(tensor)) for tensor in _tensors(block)] for block in blocks]
        for index in range(len(self.homes)):
            self._drop(index)
        self.here: set[int] = set()
        self.done: list[Any] = []  # events at the ends of the last blocks, the oldest first

    def _home(self, tensor: Tensor) -> Tensor:
        home = tensor.data.cpu()
        # Copies from other memory would wait for the device, and the device for them.
        return home if self.stream is None or home.is_pinned() else home.pin_memory()

    def before(self, index: int) -> None:
        """Have a block's weights ready, and those of the next one on their way."""
        # Python runs ahead of the device, and would fill it with weights of blocks that are not due yet.
        while len(self.done) >= BLOCKS_ON_DEVICE - 1:
            self.done.pop(0).synchronize()
        if index not in self.here:
            self._fetch(index)
        if self.stream is not None:
            current = backend(self.device).current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor, _ in self.homes[index]:
                tensor.data.record_stream(current)
            self._fetch((index + 1) % len(self.homes))

    def after(self, index: int) -> None:
        """Drop a block's weights."""
        self._drop(index)
        self.here.discard(index)
        if self.stream is not None:
            self.done.append(backend(self.device).current_stream(self.device).record_event())

    def clear(self) -> None:
        """Drop what is still there."""
        for index in self.here:
            self._drop(index)
        self.here.clear()

    def _fetch(self, index: int) -> None:
        if index in self.here:
            return
        self.here.add(index)
        copying: AbstractContextManager[Any] = (
            nullcontext() if self.stream is None else backend(self.device).stream(self.stream)
        )
        with copying:
            for tensor, home in self.homes[index]:
                tensor.data = home.to(self.device, non_blocking=True, copy=True)

    def _drop(self, index: int) -> None:
        for tensor, home in self.homes[index]:
            tensor.data = home


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
