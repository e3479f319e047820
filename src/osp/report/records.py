"""The forms of the records in folders that a page shows, and the check of which files it may show."""

from pathlib import Path
from typing import Any

from osp.documents import DocumentError, check_form, printable, read_json
from osp.errors import DataError

_MOST = 10**15  # of any number on a page; no float is needed to write larger ones out

_RATE = {"rate": float, "low": float, "high": float}
GENERATION = {
    "model": str,
    "settings": {"mode?": (str, None), "solver?": (dict, None)},
    "accuracy": {
        "generated": {"all": _RATE, ...: _RATE},
        "chance": {"all": float, ...: float},
        ...: {...: (_RATE, float, None)},
    },
    "frechet": {...: (float, bool, None)},
    "given": ({"psnr": float, "loss?": (float, None)}, None),
    "counts": {"generated": int},
    "clips": [{"prompt": str, "file?": str, "read": {...: (str, None)}, "right": {"all": bool}}],
}
"""The form of `metrics.json` of `osp eval target=generation`."""

RECONSTRUCTION = {
    "counts": {"clips": int},
    "mean": {"psnr": float, ...: (float, None)},
    "psnr_gain": {...: float},
    "clips": [{"key": str, "caption?": (str, None)}],
}
"""The form of `metrics.json` of `osp eval target=reconstruction`."""

RESULT = {"name": (str, float), "steps": int, "parameters": int, "seconds": float}
"""The form of `result.json` of `osp train`."""

SAMPLE = {"prompt": str, "seed?": (int, None), "fps?": (float, None)}
"""The form of a line of `samples.jsonl`."""


def read_record(path: Path, form: Any, hint: str) -> Any:
    """The value of a JSON file of this form. Raises DataError, with the hint where there is no such file."""
    try:
        value = read_json(path, form)
    except FileNotFoundError as error:
        raise DataError(f"{printable(path)}: No such file; {hint}") from error
    check_record(value, form, str(path))
    return value


def check_record(value: Any, form: Any, place: str) -> None:
    """Raise DocumentError naming `place` for a value that is not of the form, or has a number too large to show."""
    check_form(value, form, place)
    if (number := _too_large(value)) is not None:
        raise DocumentError(f"{place}: holds {str(number)[:20]}..., which is too large a number to show")


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises DataError for one that lies elsewhere, whatever way the name goes there."""
    path = folder / name
    try:
        if path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a null byte
        pass
    raise DataError(f"{printable(folder)}: {printable(name)} is no file in it, and only those are shown")


def _too_large(value: Any) -> float | None:
    if isinstance(value, dict | list):
        found = (_too_large(inner) for inner in (value.values() if isinstance(value, dict) else value))
        return next((number for number in found if number is not None), None)
    return value if isinstance(value, int | float) and abs(value) > _MOST else None
