"""`passing`: the clips whose records meet a condition on their sizes, facts and scores."""

import logging
from collections.abc import Mapping, Sequence

from osp.data.shards.entry import ClipEntry
from osp.data.sources.expression import parse
from osp.errors import DataError

log = logging.getLogger(__name__)

_SHOWN = 200  # characters of a condition in a log line
_NUMBERS = ("frames", "fps", "width", "height", "duration", "start")
_TEXTS = ("kind", "caption", "source", "key")


def facts_of(entry: ClipEntry) -> dict[str, float | str]:
    """The values that a condition may name: the facts of a clip's record, and its scores unless a fact has their name.

    `duration` is frames / fps where the record does not say it, as in features. What is not known is missing.
    """
    record = entry.record
    facts: dict[str, float | str] = {**(record.get("scores") or {})}
    facts |= {name: float(record[name]) for name in _NUMBERS if record.get(name) is not None}
    facts |= {name: str(record[name]) for name in _TEXTS if record.get(name) is not None}
    facts["key"] = entry.key
    if captions := record.get("captions"):
        facts["caption"] = str(captions[0])
    if "duration" not in facts and record.get("frames") and record.get("fps"):
        facts["duration"] = record["frames"] / record["fps"]
    return facts


def passing(entries: Sequence[ClipEntry], where: str | None, place: str) -> tuple[list[ClipEntry], Mapping[str, int]]:
    """The clips for which a condition holds, in their order, and how many are left out (reason -> clips).

    The language is that of `osp.data.sources.expression`; None keeps all. A clip that lacks a value that the condition
    needs is left out, and counted apart from those for which it does not hold. One log line has the counts.

    Raises:
        UsageError: the condition cannot be read, or names what no clip has.
        DataError: it holds for no clip.
    """
    if where is None:
        return [*entries], {}
    scores = {name for entry in entries for name in entry.record.get("scores") or ()}
    condition = parse(where, {**dict.fromkeys([*scores, *_NUMBERS], "number"), **dict.fromkeys(_TEXTS, "text")})
    found, lacking = [], set[str]()
    for entry in entries:
        facts = facts_of(entry)
        found.append(condition(facts))
        lacking |= {name for name in condition.names if found[-1] is None and name not in facts}
    shown = where if len(where) <= _SHOWN else f"{where[:_SHOWN]}..."
    kept = [entry for entry, holds in zip(entries, found, strict=True) if holds]
    left_out = {
        f"for which where={shown} does not hold": sum(holds is False for holds in found),
        f"that lack what where={shown} needs ({', '.join(sorted(lacking)) or 'a quotient'})": found.count(None),
    }
    log.info("%s: where=%s: %d clips before, %d after", place, shown, len(entries), len(kept))
    if not kept:
        reasons = ", ".join(f"{clips} {reason}" for reason, clips in left_out.items() if clips)
        raise DataError(f"{place}: none of its {len(entries)} clips passes: {reasons}; ask for less")
    return kept, {reason: clips for reason, clips in left_out.items() if clips}
