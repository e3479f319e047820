"""The clipping of a step's gradient before the optimiser takes it: the two published schemes, and the plain one.

Every process decides alike, because all see the norm of the gradient after its synchronisation. A gradient (or loss)
that is not finite never reaches the weights.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.errors import OspError
from osp.parallel import whole


class DivergedError(OspError):
    """The loss or its gradients are no longer finite."""


@dataclass(frozen=True)
class Clipped:
    """The outcome for a gradient: its norm before clipping, whether its step is dropped, whether the run is over.

    `finite` is whether gradient and loss were.
    """

    norm: float
    dropped: bool = False
    diverged: bool = False
    finite: bool = True


class Clipping(nn.Module):
    """A scheme. A subclass says in `limit` to which norm a gradient may be scaled down; its state is in checkpoints.

    `patience` is how many steps in a row may be without finite gradients; the run has diverged at the last of them.
    """

    patience = 1

    def __init__(self) -> None:
        super().__init__()
        self.not_finite = 0  # steps in a row

    def limit(self, norm: float) -> float | None:
        """The norm that a finite gradient of this norm may have at most; None: the step is dropped."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, parameters: Iterable[nn.Parameter], loss: Tensor | None = None) -> Clipped:
        """Scale the gradients of the parameters as the scheme wants. A loss that is not finite counts like them."""
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        total = whole(nn.utils.get_total_norm([one.grad for one in learning if one.grad is not None]))
        norm = float(total)
        # The norm alone is not enough: the L1 distance sends no gradient where a reconstruction is NaN.
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(float(loss))):
            self.not_finite += 1
            return Clipped(norm, dropped=True, diverged=self.not_finite >= self.patience, finite=False)
        self.not_finite = 0
        limit = self.limit(norm)
        if limit is None:
            return Clipped(norm, dropped=True)
        if limit < norm:
            nn.utils.clip_grads_with_norm_(learning, limit, total)
        return Clipped(norm)

    def logs(self) -> dict[str, float]:
        """Numbers to log of it."""
        return {}


class NormClipping(Clipping):
    """The gradient is scaled down to `max_norm` where it is larger. One that is not finite ends the run at once.

    Raises UsageError for a norm that is not above 0.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        check_number("clipping.max_norm", max_norm, above=0)
        self.max_norm = float(max_norm)

    def limit(self, norm: float) -> float | None:
        """See `Clipping.limit`."""
        return self.max_norm


class MovingAverage(Clipping):
    """The base of both published schemes: mean m and variance v of the norms so far, and the threshold m + 3 sqrt(v).

    A norm up to the threshold moves both: m <- d m + (1 - d) norm, then v <- d v + (1 - d) (m - norm)^2 (report v1.5,
    adaptive clipping). Larger ones leave them.

    How the averages begin is not published. Here the n-th norm counts with 1 - d = 1/n until that is below 1 -
    `decay`, so that m is the plain mean at first, and the first `warmup` norms are all taken as they are, since there
    is nothing to compare them with.

    A gradient that is not finite drops its step, is counted, and leaves the averages; the tenth in a row ends the run.

    Raises UsageError for values out of range.
    """

    patience = 10

    def __init__(self, decay: float = 0.99, deviations: float = 3.0, warmup: int = 20) -> None:
        super().__init__()
        check_number("clipping.decay", decay, above=0, below=1)
        check_number("clipping.deviations", deviations, above=0)
        check_number("clipping.warmup", warmup, least=1, whole=True)
        self.decay, self.deviations, self.warmup = decay, deviations, warmup
        self.mean = self.variance = 0.0
        self.norms = 0  # in the averages
        self.dropped = 0  # steps, since the run began

    @property
    def threshold(self) -> float:
        """The largest norm that is no exception; infinite while there is nothing to compare with."""
        if self.norms < self.warmup:
            return math.inf
        return self.mean + self.deviations * math.sqrt(self.variance)

    def take_in(self, norm: float) -> None:
        """Move the averages."""
        self.norms += 1
        decay = min(self.decay, 1 - 1 / self.norms)
        self.mean = decay * self.mean + (1 - decay) * norm
        self.variance = decay * self.variance + (1 - decay) * (self.mean - norm) ** 2

    def forward(self, parameters: Iterable[nn.Parameter], loss: Tensor | None = None) -> Clipped:
        """See `Clipping.forward`; counts what is dropped."""
        clipped = super().forward(parameters, loss)
        self.dropped += clipped.dropped
        return clipped

    def logs(self) -> dict[str, float]:
        """Steps dropped since the run began, and the threshold for the next one."""
        logs = {"dropped_steps": float(self.dropped)}
        return logs if math.isinf(self.threshold) else logs | {"gradient_threshold": self.threshold}

    def get_extra_state(self) -> dict[str, Any]:
        """Plain numbers in double precision, whatever the model's is."""
        names = ("mean", "variance", "norms", "dropped", "not_finite")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)


class AdaptiveClipping(MovingAverage):
    """v1.5: a gradient above the threshold is scaled down to it."""

    def limit(self, norm: float) -> float | None:
        """See `Clipping.limit`."""
        if norm <= (threshold := self.threshold):
            self.take_in(norm)
        return threshold


class AbnormalDrop(MovingAverage):
    """v1.3: a step whose gradient's norm is above the threshold is dropped as a whole; weights and averages stay.

    After `restart` of them in a row they are no exception any more, and the averages begin anew. (Neither the
    published threshold nor what follows many such steps is known.)
    """

    def __init__(self, decay: float = 0.99, deviations: float = 3.0, warmup: int = 20, restart: int = 10) -> None:
        super().__init__(decay, deviations, warmup)
        check_number("clipping.restart", restart, least=1, whole=True)
        self.restart = restart
        self.abnormal = 0  # steps in a row

    def limit(self, norm: float) -> float | None:
        """See `Clipping.limit`."""
        if norm > self.threshold:
            self.abnormal += 1
            if self.abnormal < self.restart:
                return None
            self.mean = self.variance = 0.0
            self.norms = 0
        self.abnormal = 0
        self.take_in(norm)
        return math.inf

    def get_extra_state(self) -> dict[str, Any]:
        """See `MovingAverage`."""
        return super().get_extra_state() | {"abnormal": self.abnormal}
