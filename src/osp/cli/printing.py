"""The output of a command: results on stdout, whole or not at all, and everything else on stderr, one line each."""

import json
import math
import os
import sys
from contextlib import suppress
from typing import Any

from osp.documents import printable
from osp.errors import DataError


def show(text: str) -> None:
    """Print a text to stdout. Raises DataError if nobody takes it, as when a pipe is closed or a disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        # The text in the buffer is lost, and Python must not try to write it again when it ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise DataError(f"stdout: {error.strerror}; what was to be printed is lost") from error


def show_result(result: Any) -> None:
    """Print a result as one line of JSON, in which numbers that are not finite are null."""
    show(json.dumps(_finite(result), allow_nan=False, default=str))


def say(line: str) -> None:
    """Print a line for people to stderr; what is not printable in it is escaped."""
    with suppress(OSError, AttributeError):  # nobody listens
        print(printable(line), file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
