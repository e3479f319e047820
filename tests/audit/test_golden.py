"""What is said of recorded cases: those that pass, and those that are wrong, damaged, unknown or of other settings."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from osp.audit.golden import Outcome, check, find_cases, runners, summary
from osp.weights.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SMALL = ("wavelet", "a")
VAE = ("wfvae_v13", "d_nearest_noattn_main")
DENOISER = ("opensora_v13", "d_dense_6l")
MANIFEST = "opensora_t2v_v1_3_2b.json.gz"


def copied(folder: Path, kind: str, name: str) -> Path:
    """A case in a folder of its own; the path of its files without their endings."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / kind / f"{name}{suffix}", folder / kind)
    return folder / kind / name


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads(path.with_suffix(".json").read_text())
    edit(settings)
    path.with_suffix(".json").write_text(json.dumps(settings))


def change_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {key: value.clone() for key, value in load_file(path.with_suffix(".safetensors")).items()}
    edit(tensors)
    save_file(tensors, path.with_suffix(".safetensors"))


def only(folder: Path) -> Outcome:
    (outcome,) = check(folder)
    return outcome


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_golden.py", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_each_case_has_a_line_with_its_figures_and_the_others_run_on(tmp_path: Path) -> None:
    copied(tmp_path, "wavelet", "b")
    wrong = copied(tmp_path, *SMALL)
    change_tensors(wrong, lambda t: t["out/haar2d"].view(-1)[3].add_(0.5))
    (tmp_path / "zoetrope_v0").mkdir()
    (tmp_path / "zoetrope_v0" / "a.json").write_text("{}")
    done = run(tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("failed         wavelet/a: difference 0.5, bar 1.4e-05 (haar2d, worst of 6)")
    assert lines[1].startswith("passed         wavelet/b: difference ")
    assert lines[2] == "unknown        zoetrope_v0: no such kind is known here (cases: 1)"
    assert lines[3] == "1 passed, 1 failed, 0 documented, 0 not supported, 1 unknown"


def test_a_folder_of_one_kind_and_what_is_unknown_are_no_failure(tmp_path: Path) -> None:
    copied(tmp_path, *SMALL)
    assert run(tmp_path / "wavelet").returncode == 0
    assert only(tmp_path / "wavelet").name == "wavelet/a"
    shutil.move(tmp_path / "wavelet", tmp_path / "waves")
    assert run(tmp_path).returncode == 0
    assert only(tmp_path / "waves").name == "waves"


def test_nothing_to_check_is_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no case" in done.stderr
    done = run(tmp_path / "none")
    assert done.returncode == 1
    assert "no such folder" in done.stderr


DAMAGE: list[tuple[tuple[str, str], Callable[[Path], object], str]] = [
    (SMALL, lambda p: p.with_suffix(".safetensors").unlink(), "cannot be read"),
    (SMALL, lambda p: p.with_suffix(".json").unlink(), "cannot be read"),
    (SMALL, lambda p: p.with_suffix(".json").write_text("{"), "cannot be read"),
    (SMALL, lambda p: p.with_suffix(".json").write_text("[]"), "holds no object"),
    (SMALL, lambda p: p.with_suffix(".safetensors").write_bytes(b"x"), "cannot be read"),
    (SMALL, lambda p: change_tensors(p, lambda t: t.pop("out/inv3d")), "has no out/inv3d"),
    (SMALL, lambda p: change_tensors(p, lambda t: t.pop("in/z2")), "has no in/z2"),
    (SMALL, lambda p: change_tensors(p, lambda t: t["out/haar2d"][0, 0, 0, 0, 0].fill_(torch.nan)), "difference nan"),
    (SMALL, lambda p: change_tensors(p, lambda t: t["out/haar2d"][0, 0, 0, 0, 0].fill_(torch.inf)), "difference inf"),
    (SMALL, lambda p: change_tensors(p, lambda t: t.update({"out/haar2d": t["out/haar2d"][:1].clone()})), "of shape"),
    (SMALL, lambda p: change(p, lambda s: s.pop("tolerance_f32_vs_f64")), "has no tolerance"),
    (SMALL, lambda p: change(p, lambda s: s.update(tolerance_f32_vs_f64=float("inf"))), "records no tolerance of"),
    (VAE, lambda p: change(p, lambda s: s.update(config=None)), "config is no object"),
    (VAE, lambda p: change(p, lambda s: s.pop("Ts")), "has no Ts"),
    (VAE, lambda p: change(p, lambda s: s["Ts"].append(99)), "has no in/T99/x"),
    (VAE, lambda p: change(p, lambda s: s["tolerance_f32_vs_f64"].pop("mean")), "records no tolerance of mean"),
    (VAE, lambda p: change(p, lambda s: s["config"].update(base_channels=8)), "WeightImportError: .*does not fit"),
    (VAE, lambda p: change_tensors(p, lambda t: t.update({"weights/more": torch.ones(1)})), "1 unknown: more"),
    (DENOISER, lambda p: change(p, lambda s: s["input_sets"].update(more={})), "more: has no hidden_states"),
    (
        DENOISER,
        lambda p: change_tensors(p, lambda t: t.update({"in/pad/use_image_num": torch.ones(1)})),
        "pad: the inputs use_image_num are not known",
    ),
    (DENOISER, lambda p: change_tensors(p, lambda t: t["in/pad/timestep"].add_(9)), "difference"),
    (("sched_v13", "a_100"), lambda p: change_tensors(p, lambda t: t["out/prev_50"].add_(1e-3)), "prev_50"),
    (("sched_v15", "b_dynamic_20"), lambda p: change(p, lambda s: s["config"].update(guidance_scale=5)), "cfg"),
]


@pytest.mark.parametrize(("case", "damage", "reason"), DAMAGE)
def test_a_damaged_or_wrong_case_fails_with_the_reason(
    case: tuple[str, str], damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    damage(copied(tmp_path, *case))
    outcome = only(tmp_path)
    assert outcome.state == "failed"
    assert re.search(reason, outcome.detail), outcome.detail


def test_entries_beyond_those_that_are_needed_do_no_harm(tmp_path: Path) -> None:
    for case in (SMALL, VAE, DENOISER):
        path = copied(tmp_path, *case)
        change(path, lambda s: s.update(more={"a": 1}))
        change_tensors(path, lambda t: t.update({"out/more": torch.ones(1), "out/T9/more": torch.ones(1)}))
    assert [outcome.state for outcome in check(tmp_path)] == ["passed"] * 3


def test_settings_that_are_not_built_are_neither_passed_nor_failed(tmp_path: Path) -> None:
    path = copied(tmp_path, "causalvae", "b_groupnorm")
    change(path, lambda s: s["config"].update(encoder_temporal_downsample=["TimeDownsample4x", ""]))
    path = copied(tmp_path, "sched_v15", "a_shift7_50")
    change(path, lambda s: s["config"].update(use_linear_quadratic_schedule=True))
    path = copied(tmp_path, "sched_v13", "a_100")
    change(path, lambda s: s["config"].update(beta_schedule="scaled_linear"))
    outcomes = list(check(tmp_path))
    assert [outcome.state for outcome in outcomes] == ["not supported"] * 3
    assert "TimeDownsample4x" in outcomes[0].detail
    assert summary(outcomes) == "0 passed, 0 failed, 0 documented, 3 not supported, 0 unknown"


def manifest(folder: Path, edit: Callable[[dict[str, Any]], object], name: str = MANIFEST) -> Outcome:
    content = json.loads(gzip.decompress((GOLDEN / "manifests" / MANIFEST).read_bytes()))
    edit(content)
    (folder / "manifests").mkdir(parents=True)
    (folder / "manifests" / name).write_bytes(gzip.compress(json.dumps(content).encode()))
    return only(folder)


def test_lists_of_keys_are_compared_with_the_family_that_they_are_most_like(tmp_path: Path) -> None:
    def without_one(content: dict[str, Any]) -> None:
        del content["keys"]["proj_out.bias"]
        content["n_keys"] -= 1

    assert manifest(tmp_path / "a", lambda c: None).state == "passed"
    wrong = manifest(tmp_path / "b", without_one)
    assert wrong.state == "failed"
    assert wrong.detail == "difference 1, bar 0 (keys and shapes of the family cross)"
    assert manifest(tmp_path / "c", lambda c: c["keys"].pop("proj_out.bias")).state == "failed"
    assert manifest(tmp_path / "d", lambda c: c["config"].update(more=1)).state == "unknown"
    refused = manifest(tmp_path / "e", lambda c: c["config"].update(norm_eps=1), "opensora_v13_big.json.gz")
    assert (refused.state, refused.name) == ("not supported", "manifests/opensora_v13_big")
    (tmp_path / "f" / "manifests").mkdir(parents=True)
    (tmp_path / "f" / "manifests" / MANIFEST).write_bytes(b"x")
    assert only(tmp_path / "f").state == "failed"


def test_every_kind_of_a_family_can_be_run() -> None:
    kinds = {kind for family in FAMILIES.values() for kind in family.kinds}
    assert kinds <= runners().keys()
    assert all(find_cases(GOLDEN, kind) for kind in runners())
