"""Tables: as CSV, as Markdown, and on the terminal."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV below a heading: what a row lacks is empty, and what is no column is left out."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0) -> list[str]:
    """The lines of a Markdown table, aligned: the first `left` columns to the left, all others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    heading, *body = (f"| {' | '.join(_padded(line, widths, left))} |" for line in lines)
    rule = "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return [heading, f"|{rule}|", *body]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Print a table for people to stderr; what a row lacks is empty."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 140).print(table)


def as_texts(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows with values as a table of runs shows them: numbers with three decimals, nothing for None."""
    return [{key: _text(value) for key, value in row.items()} for row in rows]


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _padded(line: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    cells = enumerate(zip(line, widths, strict=True))
    return [text.ljust(width) if i < left else text.rjust(width) for i, (text, width) in cells]
