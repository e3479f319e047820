"""What all tests of the denoisers need."""

import pytest

from osp.denoiser import patterns
from osp.denoiser.patterns import Pattern


@pytest.fixture
def pattern_kinds() -> set[type[Pattern]]:
    """The classes of all attention patterns that there are."""
    return {kind for name in patterns.__all__ if isinstance(kind := getattr(patterns, name), type)} - {Pattern}
