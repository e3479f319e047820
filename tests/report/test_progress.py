"""What is shown of the way."""

import logging
import sys

import pytest

from osp.report import progress


def test_a_log_line_now_and_then_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 10.0, 40.0, 45.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), progress.shown_progress("sampling") as show:
        for done in (0.5, 1.0, 1.1, 2.0):
            show(done, 4)
    assert caplog.messages == [
        "sampling: 25 % done, about 120 s left",
        "sampling: 50 % done, about 80 s left",
    ]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.shown_progress("sampling") as show:
        show(1.0, 2)
    out, err = capsys.readouterr()
    assert "50%" in err
    assert not out
