"""Files that lie elsewhere as streams of bytes: http(s), commands, the file systems of fsspec, paths."""

import base64
import contextlib
import http.client
import os
import select
import signal
import stat
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from osp.documents import printable
from osp.errors import UsageError

_AGAIN = frozenset({408, 409, 421, 423, 425, 429})  # statuses below 500 that may pass
_TOLD = 300  # bytes of what a command says


class Fault(Exception):
    """One attempt to read a file failed: the reason, and whether another one may succeed."""

    def __init__(self, reason: str, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = printable(reason), again, wait


@dataclass(frozen=True)
class Stream:
    """A file that is open: `read(n)` gives at most n bytes, none at the end; its size if that was said, bytes.

    `read` raises Fault.
    """

    read: Callable[[int], bytes]
    size: int | None


@contextmanager
def opened(url: str, timeout: float) -> Iterator[Stream]:
    """The stream of a file; `timeout` is the longest wait for its next bytes, seconds.

    Raises Fault, and UsageError for a url that no installed package can open.
    """
    with _opener_of(url)(url, timeout) as stream:
        yield stream


def _opener_of(url: str) -> Callable[[str, float], contextlib.AbstractContextManager[Stream]]:
    if url.startswith("pipe:"):
        return _command
    if url.startswith(("http://", "https://")):
        return _http
    if "://" in url and not url.startswith("file://"):
        return _fsspec
    return _path


# --- http -------------------------------------------------------------------------------------------------------------


@cache
def _director() -> urllib.request.OpenerDirector:
    """An opener that knows http(s) alone, so that no redirection leads to a file."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        director.add_handler(handler)
    return director


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "osp", "Accept-Encoding": "identity"}
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")), headers=headers)
    if user:
        secret = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


@contextmanager
def _http(url: str, timeout: float) -> Iterator[Stream]:
    try:
        response = _director().open(_request(url), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        wait = str(error.headers.get("Retry-After", ""))
        seconds = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0
        raise Fault(
            f"status {error.code} {error.reason}", error.code >= 500 or error.code in _AGAIN, seconds
        ) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise Fault(f"no url that can be asked for ({error})", again=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise Fault(_reason(error)) from error

    def read(count: int) -> bytes:
        try:
            data: bytes = response.read(count)
        except (OSError, http.client.HTTPException) as error:
            raise Fault(f"status {response.status}, then {_reason(error)}") from error
        return data

    with contextlib.closing(response):
        said = response.headers.get("Content-Length", "")
        yield Stream(read, int(said) if said.isascii() and said.isdigit() and len(said) < 19 else None)


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)


# --- commands ---------------------------------------------------------------------------------------------------------


@contextmanager
def _command(url: str, timeout: float) -> Iterator[Stream]:
    """The output of a shell command that the user's own setting names; its exit code counts."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            url.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=told,
            start_new_session=True,
        )
        assert process.stdout is not None
        output = process.stdout.fileno()

        def read(count: int) -> bytes:
            if not select.select([output], [], [], timeout)[0]:
                raise Fault(f"the command has given nothing for {timeout:g} s")
            if not (data := os.read(output, count)):
                _check_exit(process, told, timeout)
            return data

        try:
            yield Stream(read, None)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the command has left running
            process.stdout.close()
            process.wait()


def _check_exit(process: "subprocess.Popen[bytes]", told: IO[bytes], timeout: float) -> None:
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise Fault("the command has closed its output and does not end") from None
    if code:
        told.seek(max(0, told.seek(0, 2) - _TOLD))
        said = " ".join(told.read(_TOLD).decode("utf-8", "replace").split())
        raise Fault(f"the command ended with exit code {code}{': ' if said else ''}{said}")


# --- fsspec, paths ----------------------------------------------------------------------------------------------------


@contextmanager
def _fsspec(url: str, timeout: float) -> Iterator[Stream]:
    try:
        import fsspec
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise UsageError(f"{scheme}:// needs the package fsspec (pip install fsspec), or use pipe:COMMAND") from error
    try:
        files, path = fsspec.core.url_to_fs(url)
        file = files.open(path, "rb")
        size = files.size(path)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url.partition('://')[0]}://: fsspec cannot open it ({printable(error)})") from error
    # The file systems of fsspec raise errors of their own packages, such as botocore's.
    except Exception as error:
        raise Fault(_named(error), not isinstance(error, FileNotFoundError | PermissionError)) from error
    with contextlib.closing(file):
        yield Stream(_guarded(file), size)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _guarded(file: Any) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        try:
            data: bytes = file.read(count)
        except Exception as error:  # see above
            raise Fault(_named(error)) from error
        return data

    return read


@contextmanager
def _path(url: str, timeout: float) -> Iterator[Stream]:
    try:
        file = open(url.removeprefix("file://"), "rb", buffering=0, opener=_nonblocking)  # noqa: SIM115
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
        raise Fault(_reason(error), not gone) from error
    with file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Fault("is no regular file", again=False)
        yield Stream(_guarded(file), about.st_size)


def _nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a named pipe does not wait for who writes it
