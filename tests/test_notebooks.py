"""Notebooks are stored with what their cells draw; that they run is tested by executing them (`pytest notebooks`)."""

import ast
import base64
import io
import json
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 400_000
"""Bytes of a notebook at most, figures included."""


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def pictures(cell: dict[str, Any]) -> list[str]:
    return [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]


def drawn(cell: dict[str, Any]) -> int:
    """How many figures the cell draws: its calls of `show` and `plt.show` outside functions."""
    steps = [step for step in ast.parse("".join(cell["source"])).body if not isinstance(step, ast.FunctionDef)]
    calls = [node for step in steps for node in ast.walk(step) if isinstance(node, ast.Call)]
    return sum(ast.unparse(call.func) in ("show", "plt.show") for call in calls)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_cell_that_draws_is_stored_with_its_figures(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert {cell["id"]: len(pictures(cell)) for cell in cells} == {cell["id"]: drawn(cell) for cell in cells}
    assert sum(map(drawn, cells)) >= 5
    for cell in cells:
        for stored in pictures(cell):
            with Image.open(io.BytesIO(base64.b64decode(stored))) as picture:
                assert min(picture.size) > 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_cell_that_prints_is_stored_with_its_text_and_none_with_warnings(path: Path) -> None:
    for cell in code_cells(path):
        names = [output.get("name") for output in cell["outputs"] if output["output_type"] == "stream"]
        assert names == ["stdout"] * ("print(" in "".join(cell["source"])), cell["id"]
    assert path.stat().st_size < MOST


def test_the_tool_stores_figures_small_and_no_warnings() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "run_notebooks.py"))
    picture = io.BytesIO()
    Image.effect_noise((120, 120), 60).convert("RGB").save(picture, "PNG")
    figure = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture.getvalue()).decode()})
    kept = tool["stored"]([nbformat.v4.new_output("stream", name="stderr", text="a warning"), figure])
    assert len(kept) == 1
    with Image.open(io.BytesIO(base64.b64decode(kept[0].data["image/png"]))) as small:
        assert (small.mode, small.size) == ("P", (120, 120))
