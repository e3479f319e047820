"""Serve a folder over http and fail one request in ten: `python tools/flaky_server.py FOLDER --every 10`.

The failures take turns: status 500, status 503, a body that is cut short, a connection that is reset inside the body, a
body of unknown length that is cut short, and no answer at all.
"""

import argparse
import itertools
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FAULTS = ("500", "503", "cut", "reset", "unsized", "silent")


class FlakyServer(ThreadingHTTPServer):
    """A server on a free port of this machine; usable as a context, which gives it while it answers.

    Args:
        every: every so manyth request fails; 0: none does.
        faults: the failures that take turns.
        sized: whether answers say their length.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, every: int = 10, faults: tuple[str, ...] = FAULTS, sized: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.every, self.sized = folder, every, sized
        self.asked: list[str] = []  # the paths of all requests
        self.failed: list[str] = []  # the failures that were made
        self._faults, self._lock = itertools.cycle(faults), threading.Lock()

    @property
    def url(self) -> str:
        """Where the folder lies."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, path: str) -> str:
        """The failure of the next request, empty for none."""
        with self._lock:
            self.asked.append(path)
            if not self.every or len(self.asked) % self.every:
                return ""
            self.failed.append(next(self._faults))
            return self.failed[-1]

    def __enter__(self) -> "FlakyServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no errors."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.fault(path)
        if fault == "silent":
            return self._drop()
        if fault in ("500", "503"):
            return self.send_error(int(fault))
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        self.send_response(200)
        if self.server.sized and fault != "unsized":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault else data)
        if fault == "reset":
            self._drop()

    def _drop(self) -> None:
        """Reset the connection instead of closing it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def main() -> None:
    """Serve until ^C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=10, help="every so manyth request fails; 0: none")
    options = parser.parse_args()
    server = FlakyServer(options.folder, options.every)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
