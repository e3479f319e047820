"""Our denoisers with the published weights give the published numbers (toy sizes, recorded from the published code)."""

from pathlib import Path

import pytest

from osp.audit.case import Case
from osp.audit.golden import compare, find_cases

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("latte_v10", "latte_v11", "opensora_v13", "opensora_inpaint_v13", "ummdit_v15")
CASES = [case for kind in KINDS for case in find_cases(GOLDEN, kind)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_denoiser(case: Case) -> None:
    found = compare(case)
    recorded = [key for key in case.tensors if key.startswith("out/")]
    assert len(found) == len(recorded)
    assert {f"{name}/sample" for name in case.settings["input_sets"]} <= {one.what for one in found}
    assert [one for one in found if not one.passed] == []


def test_every_kind_has_cases() -> None:
    assert {case.kind for case in CASES} == set(KINDS)
