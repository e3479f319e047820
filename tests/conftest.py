"""Fixtures for all tests."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import osp  # noqa: F401  (before anything imports lightning: it mends torchvision on CPU torch)

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "tests" / "toys"))  # small models as others write them, which several tests need

# The suite tries the same examples each time; HYPOTHESIS_PROFILE=search tries others.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


_ENTRIES = pytest.StashKey[set[str]]()


def _visible() -> set[str]:
    return {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party files beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout (third-party clips, golden vectors)")
    return folder


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo what a command that ran within a test has set: Hydra silences the loggers that are there before it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, logger in logging.Logger.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "osp":
            logger.disabled, logger.propagate = False, True


@pytest.fixture(autouse=True)
def _log_of_the_project_alone(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Leave what other packages log out of `caplog`: how much that is depends on which tests ran before."""

    def is_own(record: logging.LogRecord) -> bool:
        return record.name.split(".")[0] in ("osp", "tests")

    caplog.handler.addFilter(is_own)
    yield
    caplog.handler.removeFilter(is_own)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember what lies in the checkout."""
    session.config.stash[_ENTRIES] = _visible()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a test has left something in the checkout; tests write to folders of their own."""
    left = _visible() - session.config.stash[_ENTRIES] - {"data", "outputs"}
    if left and not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(f"tests have left {', '.join(sorted(left))} in {ROOT}")


def pytest_collection_finish() -> None:
    """Leave all that the imports made out of garbage collection, which some of what is tested does again and again."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests on a simulated NPU, which are a session of their own (`make test-npu`)."""
    asked = any("fakenpu" in argument for argument in config.args)
    return True if collection_path.name == "fakenpu" and not asked else None
