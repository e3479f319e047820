"""Published weights give the published numbers where two processes share a clip's tokens, and the weights too."""

from pathlib import Path

import pytest
import torch
from denoisers import LAYOUTS, shared
from processes import Processes

from osp.audit.case import Case, Comparison
from osp.audit.golden import find_cases
from osp.audit.networks import load, recorded_inputs
from osp.denoiser import Denoiser

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("opensora_v13", "opensora_inpaint_v13", "ummdit_v15")
CASES = [case for kind in KINDS for case in find_cases(GOLDEN, kind)]


@torch.no_grad()
def compared(kind: str, name: str, folder: Path, layout: str) -> list[Comparison]:
    """The predictions of two processes for each recorded set of inputs."""
    case = Case(kind, name, folder)
    model = load(case)
    assert isinstance(model, Denoiser)
    split = shared(LAYOUTS[layout], model)
    sets = sorted(case.setting("input_sets"))
    bars = {one: case.bar(f"{one}/sample") for one in sets}
    return [case.compare(f"{one}/sample", split(**recorded_inputs(case, one)), bars[one]) for one in sets]


def heads(case: Case) -> int:
    """How many the published model has."""
    config = case.setting("config")
    return int(config.get("num_heads", config.get("num_attention_heads")))


@pytest.mark.parametrize("layout", ["sequence", "fsdp among those that share a clip"])
def test_two_processes_give_the_published_numbers(processes: Processes, layout: str) -> None:
    cases = [case for case in CASES if heads(case) % 2 == 0]
    assert {case.kind for case in cases} == set(KINDS)
    for case in cases:
        for found in processes.run(2, compared, case.kind, case.name, case.folder, layout):
            assert {one.what for one in found} == {f"{name}/sample" for name in case.setting("input_sets")}
            assert [one for one in found if not one.passed] == []
