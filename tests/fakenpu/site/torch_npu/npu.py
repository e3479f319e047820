"""`torch.npu`: the functions of torch.cuda, for the simulated devices. All work is done when a call returns."""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from torch_npu import library

calls: list[str] = []
"""The names of the functions below that were called and do nothing here, for tests to look at."""


def _number(device: Any = None) -> int:
    if device is None:
        return int(library.current_device())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return int(library.current_device()) if index is None else index


class Stream(torch.Stream):
    """A stream; there is but one."""

    def __new__(cls, device: Any = None, priority: int = 0, **settings: Any) -> "Stream":
        calls.append("Stream")
        return super().__new__(cls, device=torch.device("npu", _number(device)), priority=priority)


class Event(torch.Event):
    """A point in a stream; it has always been passed."""

    def __new__(cls, enable_timing: bool = False, **settings: Any) -> "Event":
        return super().__new__(cls, device=torch.device("npu", _number()), enable_timing=enable_timing)


class device:
    """The block runs on this device."""

    def __init__(self, which: Any) -> None:
        self.number = _number(which)

    def __enter__(self) -> None:
        self.before = library.current_device()
        library.set_device(self.number)

    def __exit__(self, *error: Any) -> None:
        library.set_device(self.before)


_parent = os.getpid()
device_count = library.device_count
current_device = library.current_device
default_generators = tuple(library.default_generator(number) for number in range(device_count()))


def is_available() -> bool:
    return bool(device_count() > 0)


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return os.getpid() != _parent


def set_device(device: Any) -> None:
    if _is_in_bad_fork():
        raise RuntimeError("Cannot re-initialize NPU in forked subprocess")
    library.set_device(_number(device))


def get_device_name(device: Any = None) -> str:
    return "Simulated NPU"


def synchronize(device: Any = None) -> None:
    calls.append("synchronize")


def stream(stream: Any) -> Any:
    calls.append("stream")
    return nullcontext(stream)


def set_stream(stream: Any) -> None:
    pass


def current_stream(device: Any = None) -> Stream:
    return Stream(device)


default_stream = current_stream


def empty_cache() -> None:
    calls.append("empty_cache")


def memory_stats(device: Any = None) -> dict[str, int]:
    return dict(library.memory_stats(_number(device)))


def memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.current"]


def max_memory_allocated(device: Any = None) -> int:
    return memory_stats(device)["allocated_bytes.all.peak"]


def reset_peak_memory_stats(device: Any = None) -> None:
    library.reset_peak(_number(device))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    whole = 32 << 30
    return whole - memory_allocated(device), whole


def manual_seed(seed: int) -> None:
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def get_rng_state(device: Any = "npu") -> Tensor:
    return default_generators[_number(device)].get_state()


def set_rng_state(new_state: Tensor, device: Any = "npu") -> None:
    default_generators[_number(device)].set_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    return [get_rng_state(number) for number in range(device_count())]


def set_rng_state_all(new_states: Any) -> None:
    for number, state in enumerate(new_states):
        set_rng_state(state, number)


def is_bf16_supported(*arguments: Any, **settings: Any) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]
