"""The time and cost of a training run, estimated from its operations and a device's rates."""

from dataclasses import dataclass

from osp.devices.datasheets import DataSheet
from osp.training.memory.plan import TrainingPlan

_UPDATE = 12
"""Values of four bytes read or written for each parameter by the optimiser and the averaged weights."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what takes them, and of the run; the cost in the price's currency, None without a price.

    What devices exchange is taken to be hidden behind computing as far as that is longer, and the update to read and
    write memory at its full rate.
    """

    compute: float
    exchange: float
    update: float
    steps: int
    cost: float | None

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return max(self.compute, self.exchange) + self.update

    @property
    def run(self) -> float:
        """Seconds of all steps."""
        return self.step * self.steps


def estimate(plan: TrainingPlan, device: DataSheet, mfu: float, price: float | None = None) -> Estimate:
    """The time of a run on such devices that reach the share `mfu` of their peak, at a price per device and hour."""
    asked, layout = plan.asked, plan.asked.layout
    peak = device.fp32_tflops if asked.precision == "32-true" else device.bf16_tflops
    link = device.link_gbs if layout.devices <= device.per_node else device.network_gbs
    compute = plan.flops / (1e12 * peak * mfu)
    exchange = layout.sent(plan.learned, asked.accumulate) / (1e9 * link)
    update = _UPDATE * plan.learned / layout.shards / (1e9 * device.bandwidth_gbs)
    found = Estimate(compute, exchange, update, asked.steps, None)
    cost = None if price is None else price * layout.devices * found.run / 3600
    return Estimate(compute, exchange, update, asked.steps, cost)
