"""A stand-in for torch-npu whose devices are the CPU's memory (`tests/fakenpu/device`), for tests alone.

It offers what the real one offers and the project uses, under the same names, and registers itself the same way. The
library is the file that the environment variable FAKENPU_LIBRARY names.
"""

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

__version__ = "0.0+simulated"


def _library() -> Any:
    if not (path := os.environ.get("FAKENPU_LIBRARY")):
        raise ImportError("FAKENPU_LIBRARY does not name the simulated device's library")
    loader = importlib.machinery.ExtensionFileLoader("fakenpu", path)
    spec = importlib.util.spec_from_file_location("fakenpu", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


torch.utils.rename_privateuse1_backend("npu")
library = _library()


def _group(options: Any, pg_options: Any = None) -> Any:
    gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
    return library.Hccl(gloo, options.group_rank, options.group_size)


from torch_npu import npu  # noqa: E402  (it takes the library)

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
dist.Backend.register_backend("hccl", _group, extended_api=True, devices=["npu"])

from torch_npu import operators  # noqa: E402, F401  (it declares them)

assert isinstance(sys.modules["torch_npu.npu"], ModuleType)
