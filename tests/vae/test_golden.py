"""Our VAEs with the published weights give the published numbers (toy sizes, recorded from the published code)."""

from pathlib import Path

import pytest

from osp.audit.case import Case
from osp.audit.golden import compare, find_cases
from osp.audit.networks import load
from osp.errors import UsageError
from osp.weights import load_published

GOLDEN = Path(__file__).parent.parent / "golden"
VAE_CASES = [case for kind in ("wfvae_v13", "wfvae_v15", "causalvae") for case in find_cases(GOLDEN, kind)]


def name(case: Case) -> str:
    return f"{case.kind}-{case.name}"


@pytest.mark.parametrize("case", find_cases(GOLDEN, "wavelet"), ids=name)
def test_wavelets(case: Case) -> None:
    found = compare(case)
    assert {"haar2d", "haar3d", "inv2d", "inv3d"} <= {one.what for one in found}
    assert [one for one in found if not one.passed] == []


@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize("case", VAE_CASES, ids=name)
def test_vae(case: Case, slide: bool, request: pytest.FixtureRequest) -> None:
    if slide:
        request.getfixturevalue("sliding")
    found = compare(case)
    assert len(found) == 3 * len(case.settings["Ts"])
    assert [one for one in found if not one.passed] == []


@pytest.mark.parametrize("kind", ["causalvae", "causalvae_loss"])
def test_all_recorded_cases_of_earlier_vaes_and_their_losses(kind: str, shared: Path) -> None:
    cases = find_cases(shared / "golden", kind)
    assert cases
    for case in cases:
        assert [one for one in compare(case) if not one.passed] == [], case.name


def test_every_kind_has_cases() -> None:
    assert len(find_cases(GOLDEN, "wavelet")) == 2
    assert {case.kind for case in VAE_CASES} == {"wfvae_v13", "wfvae_v15", "causalvae"}


def test_a_setting_that_no_published_vae_has_is_refused() -> None:
    case = VAE_CASES[0]
    load(case)
    with pytest.raises(UsageError, match="no setting t_interpolaton; it has"):
        load_published(case.kind, case.below("weights/"), case.settings["config"] | {"t_interpolaton": "nearest"})
