"""Sampling on several devices: the prediction with the prompt on half of them, the one without it on the other half."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from osp.denoiser import Denoiser
from osp.diffusion import guided
from osp.diffusion.guidance import Predict
from osp.parallel.exchange import Exchange
from osp.parallel.sequence import split_sequence


def split_sampling(denoiser: Denoiser, device: torch.device, is_guided: bool) -> tuple[Exchange, Exchange | None]:
    """Share the calls of a denoiser among all processes; gives the exchange of all, and that of the two branches.

    With guidance an even number of processes is halved, a half for each branch (None: there are no halves); those of a
    half share a clip's tokens. Raises UsageError for a model whose tokens cannot be split so.
    """
    every = Exchange()
    branches = 2 if is_guided and every.size % 2 == 0 else 1
    sizes = (branches, every.size // branches)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("branch", "sequence"))
    if sizes[1] > 1:
        split_sequence(denoiser, mesh["sequence"].get_group())
    return every, Exchange(mesh["branch"].get_group()) if branches == 2 else None


def branch_prediction(
    model: Callable[..., Tensor],
    conditional: Mapping[str, Any],
    unconditional: Mapping[str, Any],
    *,
    scale: float,
    rescale: float,
    over: Exchange,
) -> Predict:
    """The prediction of `osp.diffusion.guided_prediction`, of whose two calls this process makes one.

    The first of the two processes has the call with the prompt.
    """
    own = unconditional if over.rank else conditional

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        both = over.gathered(model(latent, time, **own), [len(latent)] * 2, "guidance")
        wanted, without = both.chunk(2)
        return guided(wanted, without, scale, rescale)

    return predict
