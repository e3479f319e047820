"""The squared error of predictions, in parts that add up over buckets and processes."""

from torch import Tensor

from osp.errors import UsageError


def squared_error(
    prediction: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Predictions and targets `B C T H W` -> each sample's sum of squared errors, and how many values it has, both `B`.

    `weight` (`B`) multiplies a sample's errors, `mask` (`B T H W`, 0 where the latent is padding) those of its places;
    only the mask reduces the number of values. The published loss is `errors.sum() / values.sum()` over all samples
    of a step, wherever they are computed: sum both over the processes before dividing.
    """
    if prediction.shape != target.shape:
        raise UsageError(f"a prediction of shape {tuple(prediction.shape)} has no target {tuple(target.shape)}")
    errors = (prediction.float() - target.float()).square()
    values = errors.new_full((errors.shape[0],), errors[0].numel())
    if mask is not None:
        if mask.shape != (errors.shape[0], *errors.shape[2:]):
            raise UsageError(f"mask {tuple(mask.shape)} does not fit {tuple(errors.shape)}; it must be B T H W")
        real = mask.to(errors)
        errors = errors * real[:, None]
        values = real.flatten(1).sum(1) * errors.shape[1]
    summed = errors.flatten(1).sum(1)
    return (summed if weight is None else summed * weight.to(summed)), values
