"""Writing files as a whole."""

import io
import os
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: whatever happens, there is all of it or the old one.

    What is not UTF-8 in a string (a file name may hold it) is escaped.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            sync(file)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def sync(file: BinaryIO | io.BufferedWriter) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())
