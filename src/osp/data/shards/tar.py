"""One shard that is being written: a WebDataset tar under its temporary name, with the lines of its listing."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osp.data.shards.entry import PART_FORM
from osp.errors import UsageError
from osp.files import file_digest, sync, write_whole


def to_json(value: object) -> bytes:
    """UTF-8 JSON on one line; what is not UTF-8 in a file name is escaped, and read back as it was."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


class TarShard:
    """A tar that gets its name when it is complete; the same input gives the same bytes.

    Raises:
        UsageError: another process is writing this shard, or has just written it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.media_bytes = 0
        part = path.with_name(f".{path.name}.part")
        self._file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been renamed since it was opened: then these are the bytes of a complete shard.
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(part)):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError) as error:
            self._file.close()
            raise UsageError(f"{path}: another process is writing this shard; wait for it or stop it") from error
        self._file.truncate()
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(
        self,
        key: str,
        suffix: str,
        data: bytes,
        record: Mapping[str, Any],
        sharing: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """Appends one sample: KEY.json, then KEY.SUFFIX with the media bytes.

        Then KEY.json of each of the further clips (key, record) that are `sharing` the media bytes. Where clips share
        them, or are a part of them, the JSON names the media member, so that the tar alone tells which clips it holds.
        """
        member, clips = f"{key}.{suffix}", [(key, record), *sharing]
        named = {"member": member} if sharing or any(name.rstrip("?") in record for name in PART_FORM) else {}
        self._member(f"{key}.json", to_json({**record, **named}))
        offset = self._member(member, data)
        place = {"member": member, "offset": offset, "size": len(data), "crc32": zlib.crc32(data)}
        for other, said in sharing:
            self._member(f"{other}.json", to_json({**said, **named}))
        self.lines += [to_json({**said, "key": own, **place}) for own, said in clips]
        self.media_bytes += len(data)

    def _member(self, name: str, data: bytes) -> int:
        """Writes one member with a header that is the same in every run; the offset of its data."""
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner is nobody
        header.size = len(data)
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(data))
        return offset

    def close(self, skipped: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Gives the listing and then the tar their names; the shard's entry in an index.

        The entry has the checksums of both. With `skipped` the listing begins with a line that is this entry and what
        was left out; its `listing_sha256` is then that of the lines after it and of the rest of itself.
        """
        self._tar.close()
        sync(self._file)
        part = self.path.with_name(f".{self.path.name}.part")
        sha256, size = file_digest(part), part.stat().st_size
        entry = {"file": self.path.name, "clips": len(self.lines), "bytes": size, "sha256": sha256}
        content = b"".join(line + b"\n" for line in self.lines)
        if skipped is None:
            entry["listing_sha256"] = hashlib.sha256(content).hexdigest()
        else:
            head = {**entry, "skipped": list(skipped)}
            entry["listing_sha256"] = head["listing_sha256"] = headed_digest(head, content)
            content = to_json(head) + b"\n" + content
        write_whole(self.path.with_suffix(".jsonl"), content)
        os.replace(part, self.path)
        self._file.close()
        return entry

    def discard(self) -> None:
        """Leaves nothing of it, unless it is complete."""
        if self._file.closed:
            return
        part = self.path.with_name(f".{self.path.name}.part")
        part.unlink(missing_ok=True)  # before it is unlocked: afterwards it may be another process's
        with contextlib.suppress(OSError):  # of a full disk, where closing writes what is buffered
            self._file.close()


def headed_digest(head: Mapping[str, Any], content: bytes) -> str:
    """The checksum of a listing that begins with a line about the shard: of that line without it, and of the others."""
    said = {key: value for key, value in head.items() if key != "listing_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode() + content).hexdigest()
