"""Objectives, samplers and guidance give the published numbers."""

from pathlib import Path

import pytest

from osp.audit.case import Case
from osp.audit.golden import compare, find_cases

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [case for kind in ("sched_v10", "sched_v12", "sched_v13", "sched_v15") for case in find_cases(GOLDEN, kind)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_objectives_steps_and_guidance(case: Case) -> None:
    found = compare(case)
    recorded = {key.removeprefix("out/") for key in case.tensors if key.startswith("out/")}
    compared = {one.what.split(",")[0] for one in found}
    # The sampler cuts the signal of the first step, which is none, off at 2^-12.
    assert recorded - compared <= {"x0_0"}
    assert [one for one in found if not one.passed] == []


def test_every_kind_has_cases() -> None:
    assert [(case.kind, case.name) for case in CASES] == [
        ("sched_v10", "a_v10"),
        ("sched_v10", "b_v11_masked"),
        ("sched_v10", "c_pndm_50"),
        ("sched_v10", "d_pndm_150"),
        ("sched_v12", "a_eulera_100"),
        ("sched_v12", "b_pndm_100"),
        ("sched_v12", "c_training"),
        ("sched_v13", "a_100"),
        ("sched_v13", "c_leading_20_nozsnr"),
        ("sched_v15", "a_shift7_50"),
        ("sched_v15", "b_dynamic_20"),
    ]
