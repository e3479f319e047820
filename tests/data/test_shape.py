"""The one formula between a clip's size and its latent's."""

import pytest

from osp.data.media.shape import Shape, Strides
from osp.errors import UsageError

V13 = Strides(4, 8)


@pytest.mark.parametrize(
    ("frames", "latent", "missing", "whole"), [(1, 1, 0, 1), (2, 2, 3, 1), (5, 2, 0, 5), (6, 3, 3, 5), (9, 3, 0, 9)]
)
def test_latent_frames_are_rounded_up_and_whole_lengths_down(
    frames: int, latent: int, missing: int, whole: int
) -> None:
    assert V13.latent_frames(frames) == latent
    assert V13.missing_frames(frames) == missing
    assert V13.pixel_frames(latent) == frames + missing
    assert V13.whole_frames(frames) == whole
    assert V13.latent(frames, 16, 24) == Shape(latent, 2, 3)
    assert V13.fits(frames, 16, 24) == (missing == 0)


@pytest.mark.parametrize("size", [(5, 12, 16), (5, 16, 20), (0, 16, 16), (5, 0, 16), (5, 16, 0), (4, 16, 16)])
def test_what_leaves_something_over_or_has_no_latent_does_not_fit(size: tuple[int, int, int]) -> None:
    assert not V13.fits(*size)


@pytest.mark.parametrize(
    ("frames", "near"), [(0, "1"), (-3, "1"), (2, "1 or 5"), (4, "1 or 5"), (6, "5 or 9"), (8, "5 or 9")]
)
def test_a_refused_length_names_the_nearest(frames: int, near: str) -> None:
    with pytest.raises(UsageError, match=rf"^frames={frames}: must be 1 \+ a multiple of 4, .*; use {near}$"):
        V13.check_frames(frames)


@pytest.mark.parametrize(("side", "near"), [(0, "8"), (3, "8"), (9, "8 or 16"), (23, "16 or 24")])
def test_a_refused_side_names_the_nearest(side: int, near: str) -> None:
    for name, size in (("height", (side, 16)), ("width", (16, side))):
        with pytest.raises(UsageError, match=rf"^{name}={side}: must be a multiple of 8, the stride; use {near}$"):
            V13.check_sides(*size, "the stride")


def test_what_fits_is_not_refused() -> None:
    for frames in (1, 5, 93):
        V13.check_frames(frames)
    V13.check_sides(8, 16)
