"""Log lines: one line a message with nothing in it that acts on a terminal, and a file of them that may fail."""

import logging
import sys

from osp.documents import printable


class Lines(logging.Formatter):
    """A message as one line, in which what is not printable is escaped.

    A traceback keeps its lines, and so do messages of other packages.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of a record."""
        text = super().format(record).replace("\t", "  ")
        has_lines = record.exc_info or record.stack_info or not record.name.startswith("osp")
        return "\n".join(map(printable, text.split("\n"))) if has_lines else printable(text)


class LogFile(logging.FileHandler):
    """A log file that is made with its first line; where it cannot be written, one line says so, and work goes on."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once what is wrong with the file."""
        error = sys.exc_info()[1]
        if not self._told:
            self._told = True
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"osp: {printable(self.baseFilename)}: the log cannot be written ({reason})", file=sys.stderr)
