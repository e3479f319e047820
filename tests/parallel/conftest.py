"""The processes that the tests here share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `processes`, here and in the processes that are started

from processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Up to four processes over gloo, started when they are first asked for."""
    pool = Processes()
    yield pool
    pool.close()
