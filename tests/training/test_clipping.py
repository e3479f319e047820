"""The gradient clippings, on scripted norms."""

import math

import pytest
import torch
from torch import nn

from osp.errors import UsageError
from osp.training.clipping import AbnormalDrop, AdaptiveClipping, Clipped, Clipping, NormClipping

INF, NAN = math.inf, math.nan


def clip(clipping: Clipping, norm: float, loss: float = 1.0) -> tuple[Clipped, float]:
    """What the scheme says of a gradient of this norm, and the norm that it left."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3))]
    weights[0].grad = torch.tensor([0.6 * norm, 0.0])
    weights[1].grad = torch.tensor(0.8 * norm)  # the third has none
    clipped = clipping(weights, torch.tensor(loss))
    return clipped, math.hypot(*weights[0].grad.tolist(), weights[1].grad.item())


def settled(kind: type, **settings: float) -> AdaptiveClipping | AbnormalDrop:
    """A scheme after norms around 1."""
    clipping = kind(**settings)
    for norm in [0.9, 1.1] * 100:
        clip(clipping, norm)
    return clipping


def test_adaptive_clipping_follows_the_published_rule() -> None:
    clipping = settled(AdaptiveClipping)
    mean, variance = clipping.mean, clipping.variance
    assert (mean, math.sqrt(variance)) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.1, abs=0.01))
    threshold = mean + 3 * math.sqrt(variance)
    assert clipping.logs() == {"dropped_steps": 0, "gradient_threshold": threshold}

    norm = 1.2
    clipped, left = clip(clipping, norm)
    assert (clipped.dropped, left) == (False, pytest.approx(norm))
    mean = 0.99 * mean + 0.01 * clipped.norm
    variance = 0.99 * variance + 0.01 * (mean - clipped.norm) ** 2  # with the new mean
    assert (clipping.mean, clipping.variance) == (mean, variance)

    threshold = mean + 3 * math.sqrt(variance)
    clipped, left = clip(clipping, 50.0)
    assert not clipped.dropped
    assert clipped.norm == pytest.approx(50.0)
    assert left == pytest.approx(threshold, rel=1e-5)
    assert (clipping.mean, clipping.variance) == (mean, variance)


def test_averages_begin_as_plain_means_without_clipping() -> None:
    clipping = AdaptiveClipping(warmup=5)
    norms = [3.0, 100.0, 1.0, 2.0, 4.0]
    for norm in norms:
        clipped, left = clip(clipping, norm)
        assert (clipped.dropped, left) == (False, pytest.approx(norm))
    assert clipping.mean == pytest.approx(sum(norms) / 5, rel=1e-6)
    threshold = clipping.threshold
    assert clip(clipping, 1e6)[1] == pytest.approx(threshold, rel=1e-5)


def test_an_abnormal_step_is_dropped_and_leaves_the_averages() -> None:
    clipping = settled(AbnormalDrop)
    before = clipping.mean, clipping.variance
    clipped, _ = clip(clipping, 5.0)
    assert (clipped.dropped, clipped.diverged) == (True, False)
    assert (clipping.mean, clipping.variance, clipping.dropped) == (*before, 1)
    assert clip(clipping, 1.0) == (Clipped(pytest.approx(1.0)), pytest.approx(1.0))
    assert clipping.mean != before[0]


def test_many_abnormal_steps_in_a_row_are_the_new_normal() -> None:
    clipping = settled(AbnormalDrop, restart=4, warmup=3)
    assert [clip(clipping, 5.0)[0].dropped for _ in range(4)] == [True, True, True, False]
    assert clipping.mean == pytest.approx(5.0)
    assert [clip(clipping, norm)[0].dropped for norm in (6.0, 5.5, 5.0, 90.0)] == [False, False, False, True]


@pytest.mark.parametrize("kind", [AdaptiveClipping, AbnormalDrop])
@pytest.mark.parametrize("bad", [(INF, 1.0), (NAN, 1.0), (1.0, NAN), (1.0, INF)])
def test_what_is_not_finite_is_dropped_and_ends_the_run_in_the_end(kind: type, bad: tuple[float, float]) -> None:
    clipping = settled(kind)
    before = clipping.mean, clipping.variance, clipping.norms
    for _ in range(9):
        clipped, _ = clip(clipping, *bad)
        assert (clipped.dropped, clipped.diverged) == (True, False)
    assert not clip(clipping, 1.0)[0].dropped  # one good step, and the count begins anew
    assert clipping.norms == before[2] + 1
    said = [clip(clipping, *bad)[0].diverged for _ in range(10)]
    assert said == [False] * 9 + [True]
    assert clipping.dropped == 19


def test_a_fixed_norm_clips_and_ends_the_run_at_once() -> None:
    clipping = NormClipping(2.0)
    assert clip(clipping, 1.5)[1] == pytest.approx(1.5)
    assert clip(clipping, 8.0)[1] == pytest.approx(2.0, rel=1e-5)
    assert clip(clipping, NAN)[0].diverged
    assert not clipping.state_dict()


@pytest.mark.parametrize("kind", [AdaptiveClipping, AbnormalDrop])
def test_state_goes_through_a_checkpoint_exactly(kind: type) -> None:
    clipping = settled(kind)
    clip(clipping, NAN)
    clip(clipping, 70.0)
    other = kind().to(torch.bfloat16)
    other.load_state_dict(clipping.state_dict())
    for norm in (1.0, 1.3, 70.0, NAN, 0.7):
        ours, theirs = clip(clipping, norm), clip(other, norm)
        assert repr(ours) == repr(theirs)
    assert other.state_dict() == clipping.state_dict()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NormClipping, {"max_norm": 0}),
        (AdaptiveClipping, {"decay": 1.0}),
        (AdaptiveClipping, {"deviations": 0}),
        (AbnormalDrop, {"warmup": 0}),
        (AbnormalDrop, {"restart": 0}),
    ],
)
def test_impossible_settings_are_refused(kind: type, settings: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        kind(**settings)
