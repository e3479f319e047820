"""Run notebooks and store them with what they print and draw: `python tools/run_notebooks.py notebooks/*.ipynb`."""

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

COLOURS = 128  # of a stored picture; more would make the files several times as large


def main() -> int:
    """Run each notebook of the command line in its folder, and write it anew."""
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        metadata = notebook.metadata.copy()
        settings: dict[str, Any] = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
        NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **settings).execute()
        notebook.metadata = metadata  # without what differs from one machine to another
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = stored(cell.outputs)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


def stored(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell as they are stored: without warnings, and with small pictures."""
    return [_small(output) for output in outputs if output.get("name") != "stderr"]


def _small(output: Any) -> Any:
    """The output, its picture with few colours."""
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        file = io.BytesIO()
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


if __name__ == "__main__":
    sys.exit(main())
