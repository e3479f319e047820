"""The clips of tars that another program wrote: members of one name are one sample, as WebDataset has it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from osp.data.media.folder import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from osp.data.media.limits import Limits
from osp.data.shards.captions import SIDE_CAR_BYTES, NoTextError, caption_of
from osp.data.shards.entry import ClipEntry, known_facts, part_facts, part_of
from osp.data.shards.members import Member, TarDamageError, read_members
from osp.data.summary import Tally
from osp.documents import DocumentError, decode_text, parse_json, printable

log = logging.getLogger(__name__)

_TWO_VIDEOS = "videos of samples that have another one, which is taken"


@dataclass
class _Sample:
    """The members of one name that have been seen so far."""

    key: str
    media: Member | None = None
    described: dict[str, Any] = field(default_factory=dict)  # by a JSON member
    text: dict[str, Any] = field(default_factory=dict)  # by a text member
    textless: str = ""  # why the JSON member has no text
    suffixes: list[str] = field(default_factory=list)
    member: str = ""  # of another sample, that this one is a part of too; only `osp shards` writes such samples

    def entry(self, tar: Path, media: Member | None) -> ClipEntry | None:
        """The clip, of its own media member or of another sample's; None without any."""
        if media is None:
            return None
        kind = "image" if PurePosixPath(media.name).suffix.lower() in IMAGE_SUFFIXES else "video"
        # The text member counts if the JSON member has no text.
        record = {"kind": kind} | self.text | {key: value for key, value in self.described.items() if value != ""}
        part = part_of(record, self.key)
        return ClipEntry(self.key, tar, media.name, media.offset, media.size, record, part=part)


def scan_tar(tar: Path, limits: Limits, passed_over: Tally) -> list[ClipEntry]:
    """The clips of a foreign tar, in the order in which their samples begin.

    Members of one sample share their name up to the first dot of its last part. A video counts before a thumbnail that
    travels with it; of several the last counts. Of a damaged tar the samples before the damage are taken. What is not
    taken is counted in `passed_over`.
    """
    with open(tar, "rb") as file:
        return scan_file(file, tar, limits, passed_over)


def scan_file(file: BinaryIO, tar: Path, limits: Limits, passed_over: Tally) -> list[ClipEntry]:
    """The same of a tar that is open."""
    samples: dict[str, _Sample] = {}
    damage = ""
    try:
        for member, key, suffix in _files(read_members(file), tar, passed_over):
            sample = samples.setdefault(key, _Sample(key))
            _add(sample, file, member, suffix, tar, limits, passed_over)
    except (TarDamageError, OSError) as error:
        damage = str(error)
    named = {sample.media.name: sample.media for sample in samples.values() if sample.media is not None}
    media = {sample.key: sample.media or named.get(sample.member) for sample in samples.values()}
    entries = [entry for sample in samples.values() if (entry := sample.entry(tar, media[sample.key])) is not None]
    for sample in samples.values():
        if media[sample.key] is None:
            held = f"{tar.name}: {sample.key} ({' '.join(sample.suffixes)})"
            passed_over.add("samples without a video or image", held)
        elif sample.textless and not sample.text:
            passed_over.add("JSON members without a text", sample.textless)
    if damage:
        log.warning("%s: damaged, only its first %d clips are used (%s)", tar, len(entries), printable(damage))
    return entries


def _files(members: Iterator[Member], tar: Path, passed_over: Tally) -> Iterator[tuple[Member, str, str]]:
    """Each file with its WebDataset key and the last suffix of its name, in small letters."""
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if member.kind == "file" and dot and stem:
            yield member, f"{folder}/{stem}" if folder else stem, PurePosixPath(name).suffix.lower()
        elif member.kind == "other":
            passed_over.add("members that are links, devices or files with holes", f"{tar.name}: {member.name}")


def _add(
    sample: _Sample, file: BinaryIO, member: Member, suffix: str, tar: Path, limits: Limits, passed_over: Tally
) -> None:
    sample.suffixes.append(suffix)
    place = f"{tar.name}: {member.name}"
    if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES:
        if member.size > limits.member_bytes:
            passed_over.add(f"members of more than limits.member_bytes={limits.member_bytes}", place)
        elif sample.media is None or suffix in VIDEO_SUFFIXES:
            if sample.media is not None and PurePosixPath(sample.media.name).suffix.lower() in VIDEO_SUFFIXES:
                passed_over.add(_TWO_VIDEOS, f"{tar.name}: {sample.media.name}")
            sample.media = member
    elif suffix in (".json", ".txt"):
        try:
            _describe(sample, _content(file, member, place), suffix, place, limits)
        except DocumentError as error:
            passed_over.add("JSON or text members that are passed over", error)


def _content(file: BinaryIO, member: Member, place: str) -> bytes:
    if member.size > SIDE_CAR_BYTES:
        raise DocumentError(f"{place}: has {member.size} bytes, more than the {SIDE_CAR_BYTES} that are read")
    file.seek(member.offset)
    return file.read(member.size)


def _describe(sample: _Sample, content: bytes, suffix: str, place: str, limits: Limits) -> None:
    if suffix == ".txt":
        sample.text = caption_of({"text": decode_text(content, place)}, place, limits).as_record()
        return
    row = parse_json(content, place, {...: Any})
    facts = known_facts(row)
    for key in ("caption", "captions"):
        facts.pop(key, None)
    sample.described |= facts
    if isinstance(row.get("member"), str):
        sample.member = row["member"]
        sample.described |= part_facts(row, place)
    try:
        sample.described |= caption_of(row, place, limits).as_record()
    except NoTextError as error:
        sample.textless = str(error)
