"""The time and cost of a training run, estimated from its operations and a device's rates."""

from dataclasses import dataclass, replace

from osp.devices.datasheets import DataSheet
from osp.training.memory.plan import TrainingPlan

_UPDATE = 12
"""Values of four bytes read or written for each parameter by the optimiser and the averaged weights."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what takes them, and of the run; the cost in the price's currency, None without a price.

    What devices exchange of weights and gradients is taken to be hidden behind computing as far as that is longer,
    what they exchange of tokens is not, and the update to read and write memory at its full rate.
    """

    compute: float
    exchange: float
    tokens: float
    update: float
    steps: int
    cost: float | None

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return max(self.compute + self.tokens, self.exchange) + self.update

    @property
    def run(self) -> float:
        """Seconds of all steps."""
        return self.step * self.steps


def estimate(plan: TrainingPlan, device: DataSheet, mfu: float, price: float | None = None) -> Estimate:
    """The time of a run on such devices that reach the share `mfu` of their peak, at a price per device and hour."""
    asked, layout = plan.asked, plan.asked.layout
    peak = device.fp32_tflops if asked.precision == "32-true" else device.bf16_tflops
    compute = plan.flops / (1e12 * peak * mfu)
    near, far = layout.sent(plan.learned, asked.accumulate)
    exchange = near / (1e9 * device.link_gbs) + far / (1e9 * device.network_gbs)
    tokens = plan.sent / (1e9 * device.link_gbs)
    update = _UPDATE * plan.learned / layout.shards / (1e9 * device.bandwidth_gbs)
    found = Estimate(compute, exchange, tokens, update, asked.steps, None)
    cost = None if price is None else price * layout.devices * found.run / 3600
    return replace(found, cost=cost)
