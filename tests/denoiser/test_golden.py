"""Our denoisers with the published weights give the published numbers (toy sizes, recorded from the published code)."""

from pathlib import Path

import pytest

from osp.audit.case import Case
from osp.audit.golden import compare, find_cases

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("latte_v10", "latte_v11", "opensora_v12", "opensora_inpaint_v12", "opensora_v13", "opensora_inpaint_v13")
KINDS += ("ummdit_v15",)
CASES = [case for kind in KINDS for case in find_cases(GOLDEN, kind)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_denoiser(case: Case) -> None:
    found = [one for one in compare(case) if not one.documented]
    recorded = [key for key in case.tensors if key.startswith("out/")]
    assert len(found) == len(recorded)
    assert {f"{name}/sample" for name in case.settings["input_sets"]} <= {one.what.split(",")[0] for one in found}
    assert [one for one in found if not one.passed] == []


def test_positions_are_right_where_the_published_tables_are_not() -> None:
    (case,) = [case for case in CASES if (case.kind, case.name) == ("opensora_v12", "b_720p_scales")]
    found = {one.what: one for one in compare(case)}
    documented = {what: one.difference for what, one in found.items() if one.documented}
    assert documented == {"square": pytest.approx(0.1, rel=0.1), "t_as_long_as_h": pytest.approx(0.21, rel=0.1)}
    # With the published tables our model gives what is recorded, so nothing else is behind the difference.
    assert all(found[f"{name}/sample, tables as published"].passed for name in documented)


def test_every_kind_has_cases() -> None:
    assert {case.kind for case in CASES} == set(KINDS)
