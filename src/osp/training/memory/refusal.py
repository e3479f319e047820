"""The refusal of a training run that cannot fit, before its first step."""

from collections.abc import Sequence

from osp.errors import OspError
from osp.training.memory.advice import Advice
from osp.training.memory.plan import TrainingPlan

GIB = 2**30


class DoesNotFitError(OspError):
    """A training run needs more memory than its devices have."""


def refusal(plan: TrainingPlan, available: int, advice: Sequence[Advice], otherwise: str = "") -> DoesNotFitError:
    """The error that says by how much a run does not fit, its largest part, and the settings to change.

    `otherwise` stands at its end.
    """
    fitting = next((one for one in advice if one.plan.peak <= available), None)
    if fitting is not None:
        mend = f"{' '.join(fitting.settings)} needs {fitting.plan.peak / GIB:.2f} GiB"
    elif advice:
        least = min(advice, key=lambda one: one.plan.peak)
        mend = f"{' '.join(least.settings)} still needs {least.plan.peak / GIB:.2f} GiB: take more or larger devices"
    else:
        mend = "take a smaller clip or model, or more or larger devices"
    return DoesNotFitError(
        f"does not fit: each device needs {plan.peak / GIB:.2f} GiB and has {available / GIB:.2f}; the largest part "
        f"are the {plan.largest} ({plan.parts[plan.largest] / GIB:.2f} GiB); {mend}{otherwise}"
    )
