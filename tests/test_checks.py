"""The one wording of a refused number or choice."""

import re
from typing import Any

import pytest

from osp.checks import check_choice, check_number
from osp.errors import DataError, UsageError

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (0, {"least": 1, "whole": True}, "key=0: must be a whole number of at least 1"),
    (1.5, {"least": 1, "whole": True}, "key=1.5: must be a whole number of at least 1"),
    (1.5, {"least": 0, "most": 1}, "key=1.5: must lie between 0 and 1"),
    (2**63, {"least": 0, "most": 2**63 - 1, "whole": True}, f"of at least 0 and of at most {2**63 - 1}"),
    (0, {"above": 0}, "key=0: must be a number above 0"),
    (1, {"least": 0, "below": 1.0}, "key=1: must be a number of at least 0 and below 1"),
    (True, {"least": 0}, "key=true: must be a number of at least 0"),
    ("4", {"least": 0}, "key=4: must be a number of at least 0"),
    (float("nan"), {}, "key=nan: must be a number"),
    (float("inf"), {"least": 0}, "key=inf: must be a number of at least 0"),
    (None, {"least": 0}, "key=null: must be a number of at least 0"),
    (-1, {"least": 0, "null": "the model's own"}, "key=-1: must be a number of at least 0, or null: the model's own"),
]


@pytest.mark.parametrize(("value", "limits", "message"), REFUSED)
def test_a_number_is_refused_with_key_value_and_limit(value: Any, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message) + "$"):
        check_number("key", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (1, {"least": 1, "whole": True}),
        (0.0, {"least": 0, "most": 1}),
        (1, {"most": 1}),
        (10**400, {"least": 0, "whole": True}),
        (0.999, {"below": 1}),
        (None, {"least": 0, "null": "none"}),
    ],
)
def test_a_limit_itself_is_allowed(value: Any, limits: dict[str, Any]) -> None:
    check_number("key", value, **limits)


def test_a_choice_is_refused_with_all_there_are() -> None:
    check_choice("key", "b", iter("abc"))
    with pytest.raises(UsageError, match=r"^key=d: is not known; choose a, b or c$"):
        check_choice("key", "d", "abc")
    with pytest.raises(DataError, match=r"^key=null: is not known; choose true$"):
        check_choice("key", None, [True], DataError)
