"""The places that a setting names: tars, files that list tars, and folders with an index; and the names below them.

A setting may name anything that the user could read or run. What a file from elsewhere says may only name tars beside
it, so that no index can have a command run or a local file read.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from webdataset.shardlists import expand_urls

from osp.documents import printable
from osp.errors import DataError, UsageError

PIPE = "pipe:"
_NAME_IN_PIPE = "{name}"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_LIST_SUFFIXES = (".txt", ".list")


@dataclass(frozen=True)
class Place:
    """One expanded entry of the setting: a `tar`, a `list` of tars, or a `folder` with an index."""

    url: str
    kind: str


def expand(urls: str | Sequence[str]) -> list[Place]:
    """The places that a setting names, in its order.

    Braces are expanded as the webdataset library does: `{000..099}` and `{a,b}`, several patterns joined by `::`,
    `${NAME}` for the environment variable `WDS_NAME`. Raises UsageError for what is no text, and for none at all.
    """
    patterns = [urls] if isinstance(urls, str | Path) else list(urls)
    places = [Place(url, _kind(url)) for pattern in patterns for url in _expanded(str(pattern))]
    if not places:
        raise UsageError("urls=[]: name shards, a file that lists them, or a folder with an index")
    return places


def _expanded(pattern: str) -> list[str]:
    if not pattern.strip():
        raise UsageError("urls: an empty name; name shards, a file that lists them, or a folder with an index")
    if is_remote(pattern) and not pattern.startswith(("http://", "https://", PIPE)) and pattern.count("://") > 1:
        return [pattern]  # chained file systems of fsspec have `::` in their names
    try:
        return [str(url) for url in expand_urls(pattern)]
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"urls={printable(pattern)}: cannot be expanded ({printable(error)})") from error


def _kind(url: str) -> str:
    if url.startswith(PIPE):
        return "folder" if _NAME_IN_PIPE in url else "tar"
    path = urlsplit(url).path if is_remote(url) else url
    return "tar" if path.endswith(".tar") else "list" if path.endswith(_LIST_SUFFIXES) else "folder"


def is_remote(url: str) -> bool:
    """Whether it names anything but a file of this machine."""
    return url.startswith(PIPE) or (bool(_SCHEME.match(url)) and not url.startswith("file://"))


def beside(folder: str, name: str) -> str:
    """The place of a file with a plain name in a folder. Raises DataError for any other name."""
    if not _SAFE_NAME.fullmatch(name):
        raise DataError(
            f"{shown(folder)}: its index names {printable(name[:80])}, where only plain names of files beside it are "
            "read (letters, digits, _ . -)"
        )
    if folder.startswith(PIPE):
        return folder.replace(_NAME_IN_PIPE, shlex.quote(name))
    if not is_remote(folder):
        return str(Path(folder.removeprefix("file://")) / name)
    if not folder.startswith(("http://", "https://")):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def listed(place: str, text: str) -> list[str]:
    """The tars that a file lists, one a line; empty lines and those that begin with # are passed over.

    A file of this machine may name urls, and paths from its own folder on. A file from elsewhere may only give plain
    names of tars beside it. Raises DataError naming the line.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if name.startswith(PIPE):
            raise DataError(
                f"{shown(place)}:{number}: a list cannot name commands (pipe:); only the setting itself can"
            )
        if is_remote(place):
            found.append(beside(parent(place), name))
        else:
            found.append(name if _SCHEME.match(name) else str(Path(place.removeprefix("file://")).parent / name))
    return found


def parent(url: str) -> str:
    """The folder of a remote file."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))


def shown(url: str) -> str:
    """The place as errors name it: without the password and the query, which may hold keys."""
    if url.startswith(PIPE) or not is_remote(url):
        return printable(url)
    parts = urlsplit(url)
    return printable(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))
