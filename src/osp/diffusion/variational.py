"""The variational bound of a learned variance (Nichol and Dhariwal, arXiv 2102.09672), as v1.0 and v1.1 trained it."""

import math

import torch
from torch import Tensor

# Clean values count as discretised to steps of 2 * _HALF_BIN, open beyond _OPEN (Ho et al., arXiv 2006.11239, eq. 13).
_HALF_BIN, _OPEN = 1 / 255, 0.999
_LEAST = 1e-12  # of a probability


def bound_tables(kept: Tensor) -> Tensor:
    """Three numbers for each step, `3 steps` in float32, that `variational_bits` needs, from alpha^2 there (float64).

    The rows are the log variance of the posterior (that of step 1 stands for step 0, where there is none); log(beta);
    and how far the posterior's mean moves with the prediction of the noise.
    """
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    low = torch.cat([posterior[1:2], posterior[1:]]).log()
    return torch.stack([low, beta.log(), beta / ((1 - kept) * (1 - beta)).sqrt()]).float()


def variational_bits(tables: Tensor, output: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The term of the bound that belongs to each value at its sample's step, in bits, `B C T H W` in float32.

    `output` (`B 2C T H W`) predicts the noise, then v, which is -1 to 1: the log variance lies (v + 1) / 2 of the way
    from the posterior's to log(beta). The term is the divergence from the true posterior of the step before, and at
    step 0 the likelihood of the clean values. No gradient of it reaches the prediction of the noise.
    """
    predicted, v = output.float().chunk(2, dim=1)
    low, high, factor = tables[:, time.long()].view(3, -1, *[1] * (clean.ndim - 1))
    log_variance = low + (v + 1) / 2 * (high - low)
    # Both means come from the same noisy latent, so that they differ as the noise does.
    off = factor * (predicted.detach() - noise.float())
    divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + off.square() * (-log_variance).exp())
    first = (time == 0).view_as(low)
    # Zero in place of the other steps' values keeps infinities, and so NaN, out of the gradient.
    surprise = _surprise(clean.float(), off, log_variance.where(first, 0.0))
    return surprise.where(first, divergence) / math.log(2)


def _surprise(clean: Tensor, off: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the log likelihood of clean values under normal distributions with means that are `off` below them."""
    scale = (-0.5 * log_variance).exp()
    above, below = _normal_cdf(scale * (off + _HALF_BIN)), _normal_cdf(scale * (off - _HALF_BIN))
    share = torch.where(clean < -_OPEN, above, torch.where(clean > _OPEN, 1 - below, above - below))
    return -share.clamp(min=_LEAST).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The cumulative normal distribution, in the approximation by tanh that the published code takes too."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
