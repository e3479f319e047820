"""A pytest session of its own, since the name of the device is the whole process's: `make test-npu`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "site"), str(HERE.parent / "parallel")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "site"), os.environ.get("PYTHONPATH", "")]))

from build import built  # noqa: E402
from processes import Processes  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Build before the processes of the session start, which inherit the variables."""
    if not hasattr(config, "workerinput"):
        library, reason = built()
        os.environ["FAKENPU_LIBRARY"], os.environ["FAKENPU_MISSING"] = str(library or ""), reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a compiler all are skipped, and say so."""
    if reason := os.environ["FAKENPU_MISSING"]:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Up to four processes, started when they are first asked for."""
    pool = Processes()
    yield pool
    pool.close()
