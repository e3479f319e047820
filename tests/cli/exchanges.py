"""Operations between processes that go wrong; the processes that are started import them from here."""

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor


def wrong(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    given = torch.full((8,), float(rank), dtype=dtype)
    dist.all_reduce(given)
    return given, torch.full((8,), 2.0 if dtype is torch.bfloat16 else 1.0)


def hang(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if rank == 1:
        time.sleep(600)
    dist.barrier()
    return torch.zeros(1), torch.zeros(1)


def die(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if rank == 1:
        os._exit(3)
    return torch.zeros(1), torch.zeros(1)
