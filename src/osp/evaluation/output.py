"""The files that an evaluation leaves in its folder."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from osp.data.media.pictures import encode_png
from osp.data.media.video import write_video
from osp.errors import DataError
from osp.files import write_whole
from osp.report.contact_sheet import write_sheet

METRICS = "metrics.json"
TABLE = "metrics.csv"
SHEET = "contact_sheet.png"


def begin(output: str | Path, *folders: str) -> Path:
    """The folder `output`, made if it is not there, without the pictures and videos of an earlier evaluation.

    Those are the contact sheet and what is in `folders` of it. Raises DataError if it cannot be made a folder.
    """
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output={path}: cannot be made a folder ({error.strerror})") from error
    for outdated in (path / SHEET, *(file for name in folders for file in (path / name).glob("*.*"))):
        outdated.unlink(missing_ok=True)
    return path


def write_results(output: Path, results: Mapping[str, Any], table: str, sheet: Image.Image | None) -> None:
    """Write the metrics as JSON and as CSV, and the contact sheet if there is one.

    JSON has no numbers that are not finite: one among the settings, as of a training that failed, becomes null.
    """
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_whole(output / METRICS, text.encode("utf-8", "backslashreplace"))
    write_whole(output / TABLE, table)
    if sheet is not None:
        write_sheet(output / SHEET, sheet)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_clip(folder: Path, name: str, video: Tensor, fps: float) -> Path:
    """uint8 `C T H W` as `folder/name.mp4`, a single frame as PNG; what a file's name cannot hold becomes "_"."""
    folder.mkdir(exist_ok=True)
    path = folder / re.sub(r"[^\w.-]+", "_", name)
    if video.shape[1] == 1:
        path = path.with_name(f"{path.name}.png")
        write_whole(path, encode_png(video[:, 0]))
    else:
        path = path.with_name(f"{path.name}.mp4")
        write_video(path, video, fps)
    return path
