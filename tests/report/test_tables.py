"""Tables as CSV, as Markdown, and on the terminal."""

import csv
import io

import pytest

from osp.report.tables import as_texts, csv_text, markdown_table, print_table

ROWS = [{"name": 'a "b", c', "loss": 0.25, "steps": 10, "other": 1}, {"name": "d", "loss": None}]


def test_csv_has_the_columns_and_leaves_empty_what_a_row_lacks() -> None:
    text = csv_text(["name", "loss", "steps"], ROWS)
    assert list(csv.reader(io.StringIO(text))) == [["name", "loss", "steps"], ['a "b", c', "0.25", "10"], ["d", "", ""]]
    assert text.endswith("\n")


def test_markdown_is_aligned() -> None:
    assert markdown_table(["what", "n"], [["a", "12"], ["longer", "3"]], left=1) == [
        "| what   |  n |",
        "|--------|---:|",
        "| a      | 12 |",
        "| longer |  3 |",
    ]
    assert markdown_table(["x"], [])[1] == "|--:|"


def test_a_printed_table_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    texts = as_texts(ROWS)
    assert texts[0] == {"name": 'a "b", c', "loss": "0.250", "steps": "10", "other": "1"}
    print_table("two runs", ["name", "loss", "steps"], texts)
    out, err = capsys.readouterr()
    assert not out
    assert "two runs" in err
    assert "0.250" in err
    assert "other" not in err
