"""Modules of a user's own are imported by their names, from the current folder too, and in processes started later."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from osp.denoiser import Stage
from osp.denoiser.patterns import registry
from osp.errors import UsageError
from osp.extensions import VARIABLE, import_modules

PATTERN = """
from osp.denoiser.patterns import Dense, register_pattern

register_pattern("of_mine", Dense)
"""


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of one's own, and nothing of it left in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("names", ["one_of_mine", ["one_of_mine"]])
def test_a_module_of_the_current_folder_is_imported(names: object, tmp_path: Path) -> None:
    (tmp_path / "one_of_mine.py").write_text(PATTERN)
    import_modules(names)
    assert Stage(1, "of_mine").blocks == 1
    assert os.environ[VARIABLE] == "one_of_mine"


def test_a_process_started_later_imports_it_when_it_meets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_of_mine.py").write_text(PATTERN)
    with pytest.raises(UsageError, match="pattern=of_mine: is not known"):
        Stage(1, "of_mine")
    monkeypatch.setenv(VARIABLE, "two_of_mine")
    assert Stage(1, "of_mine").blocks == 1


def test_what_cannot_be_imported_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken_of_mine.py").write_text("1 / 0")
    (tmp_path / "lacking_of_mine.py").write_text("import nowhere_at_all")
    (tmp_path / "taken_of_mine.py").write_text(PATTERN.replace("of_mine", "2+1d"))
    for name, message in {
        "absent_of_mine": "imports=absent_of_mine: it is not found; start in the folder that holds absent_of_mine.py",
        "broken_of_mine": "imports=broken_of_mine: importing it fails: ZeroDivisionError: division by zero",
        "lacking_of_mine": "imports=lacking_of_mine: it imports nowhere_at_all, which is not found",
        "taken_of_mine": "there is another pattern",
    }.items():
        with pytest.raises(UsageError) as refused:
            import_modules([name])
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    for names in (3, [3], {"a": 1}):
        with pytest.raises(UsageError, match="must be a list of names"):
            import_modules(names)
