"""The cleaning of captions against recorded strings."""

from collections.abc import Iterator

from osp.audit.case import Case, Comparison, Unsupported
from osp.conditioning.cleaning import CLEANINGS
from osp.errors import DataError

_CLEANINGS = {
    "v10_v11": "twice_no_cjk",
    "t5_in_v12": "twice_no_cjk",
    "mt5": "twice",
    "v13": "once",
    "v15": "twice_no_cjk",
}
"""The cleaning that each column of a case records."""


def run_cleaning(case: Case) -> Iterator[Comparison]:
    """Each recorded text after each cleaning: 1 where it is another than the recorded one, which must be none."""
    pairs = case.setting("pairs")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and "text" in pair for pair in pairs):
        raise DataError(f"{case.folder / case.name}.json: pairs must be a list of objects with a text")
    for pair in pairs:
        for column, recorded in pair.items():
            if column == "text":
                continue
            if column not in _CLEANINGS:
                raise Unsupported(f"{column}: no such cleaning is known, only {', '.join(_CLEANINGS)}")
            cleaned = CLEANINGS[_CLEANINGS[column]](pair["text"])
            yield Comparison(f"{column} of {pair['text']!r}: {cleaned!r}", float(cleaned != recorded), 0.0)
