"""The table of what the published recipes take is what the tool prints."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osp.cli import config_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tool, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plan_recipes

    yield plan_recipes
    for name in ("plan_recipes", "check_plan"):
        sys.modules.pop(name)


def written(tool: Any) -> dict[str, list[str]]:
    """The rows of the page by experiment."""
    table = tool.PAGE.read_text().partition(tool.BEGIN)[2].partition(tool.END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row for row in rows}


def test_the_page_has_all_published_recipes(tool: Any) -> None:
    names = {file.stem for file in (config_folder() / "experiment").glob("*.yaml")}
    published = {name for name in names if not name.endswith(("_tiny", "_shared"))}
    assert list(written(tool)) == [recipe.experiment for recipe in tool.RECIPES]
    assert set(written(tool)) == published


@pytest.mark.parametrize("name", ["wfvae_v13_4ch", "v11_stage1"])
def test_a_row_is_what_the_tool_prints(name: str, tool: Any) -> None:
    recipe = next(one for one in tool.RECIPES if one.experiment == name)
    assert tool.row(recipe, "h100") == written(tool)[recipe.experiment]
