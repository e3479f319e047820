"""Fixtures for all tests."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

import osp  # noqa: F401  (before anything imports lightning: it mends torchvision on CPU torch)

ROOT = Path(__file__).resolve().parent.parent

# The suite tries the same examples each time; HYPOTHESIS_PROFILE=search tries others.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of third-party files beside the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout (third-party clips, golden vectors)")
    return folder


def pytest_collection_finish() -> None:
    """Leave all that the imports made out of garbage collection, which some of what is tested does again and again."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests on a simulated NPU, which are a session of their own (`make test-npu`)."""
    asked = any("fakenpu" in argument for argument in config.args)
    return True if collection_path.name == "fakenpu" and not asked else None
