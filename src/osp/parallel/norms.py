"""Norms over a batch whose clips lie in several processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm in training over the batches of all processes, as of one batch that holds them all; in float32.

    Batches have the same size in all of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`B C T H W` or `B C H W` -> the same, normalised."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, processes = (0, *range(2, x.ndim)), dist.get_world_size()
        count = values.numel() // values.shape[1] * processes
        mean = _Sum.apply(values.mean(dims)) / processes
        each = (-1, *(1 for _ in dims[1:]))  # one value a channel
        centred = values - mean.reshape(each)
        variance = _Sum.apply(centred.square().mean(dims)) / processes
        self.num_batches_tracked.add_(1)
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.reshape(each) + self.bias.reshape(each)).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""


def share_norms(model: nn.Module) -> None:
    """Make the batch norms of a model see the batches of all processes; names and tensors stay as they are."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
                shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum, device="meta")
                shared.weight, shared.bias = layer.weight, layer.bias
                for buffer, value in layer.named_buffers():
                    setattr(shared, buffer, value)
                setattr(parent, name, shared.train(layer.training))
