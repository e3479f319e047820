"""`osp doctor`: this machine passes, and each thing that may be wrong with one is told in its line."""

import importlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))  # for `exchanges`, here and in the processes that are started

import exchanges

from osp.audit.doctor import drivers, exchange, machine, speed, steps, versions
from osp.audit.doctor.kernels import Kernel, check_kernels, drawn
from osp.audit.doctor.result import STATES, Result
from osp.audit.doctor.run import CHECKS, configured_values, examine
from osp.audit.doctor.subject import Subject, installed_version
from osp.cli import config_folder, main
from osp.devices.collectives import OPERATIONS
from osp.devices.inventory import Drivers

Osp = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
attention_file: Any = importlib.import_module("osp.devices.attention")  # the package's name for it is the function


def states(results: list[dict[str, Any]], state: str) -> list[str]:
    return [result["name"] for result in results if result["state"] == state]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """The folder, the output and the exit code of the whole command."""
    folder, out, code = tmp_path_factory.mktemp("doctor"), io.StringIO(), 0
    given, here = sys.argv, Path.cwd()
    sys.argv = ["osp", "doctor", "device=cpu", f"output={folder / 'new' / 'report.json'}"]
    os.chdir(folder)
    try:
        with redirect_stdout(out):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(here)
        sys.argv = given
    return folder, out.getvalue(), code


def test_all_is_well_here(asked: tuple[Path, str, int]) -> None:
    folder, out, code = asked
    *lines, total, last = out.splitlines()
    made = json.loads(last)
    results = made["results"]
    assert code == 0
    assert not states(results, "failed")
    # What another program does to the machine meanwhile may be worth a warning.
    assert not [name for name in states(results, "warning") if not name.startswith("host.")]
    assert {name.partition(".")[0] for name in states(results, "passed")} == {*CHECKS} - {"drivers"}
    assert {f"collectives.{name}" for name in OPERATIONS} <= {*states(results, "passed")}
    assert [line[:14].strip() for line in lines] == [result["state"] for result in results]
    assert all(result["name"] in line for line, result in zip(lines, results, strict=True))
    assert total.startswith(f"{made['passed']} passed, ")
    assert json.loads((folder / "new" / "report.json").read_text()) == made
    assert [path.name for path in folder.iterdir()] == ["new"]  # nothing else is left behind


def test_the_report_has_one_form(asked: tuple[Path, str, int]) -> None:
    made = json.loads(asked[1].splitlines()[-1])
    forms = {"osp": str, "torch": str, "time": str, "seconds": float, "devices": dict, "results": list}
    numbers = [state.replace(" ", "_") for state in STATES]
    assert {key: type(value) for key, value in made.items()} == forms | dict.fromkeys(numbers, int)
    assert sum(made[number] for number in numbers) == len(made["results"])
    assert [*made["devices"]] == ["cpu"]
    texts = dict.fromkeys(("name", "state", "detail", "mend", "device"), str)
    for result in made["results"]:
        assert {key: type(value) for key, value in result.items()} == texts | {"measured": dict}
        assert result["state"] in STATES
        assert bool(result["mend"]) == (result["state"] in ("failed", "warning"))
    (peak,) = (result["measured"] for result in made["results"] if result["name"] == "speed.peak")
    assert {*peak} == {"float32", "bfloat16", "convolution", "memory"}
    assert all(rate > 0 for rate in peak.values())


def test_the_shapes_are_those_of_the_models() -> None:
    assert {48, 72, 96, 128} <= {*configured_values(config_folder() / "denoiser", "head_dim")}
    assert {128, 160, 192} <= {*configured_values(config_folder() / "vae", "base_channels")}


def without_mask(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    return attention_file._sdpa(q, k, v, None)


def with_short_mask(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    """The mask has no effect beyond 512 keys."""
    if keys is not None and keys.shape[1] > 512:
        keys = torch.cat((keys[:, :512], torch.ones_like(keys[:, 512:])), dim=1)
    return attention_file._sdpa(q, k, v, keys)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return 0.5 * gradients[0]


def wrong_backward(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    k = HalfGradient.apply(k) if keys is None else k
    return attention_file._sdpa(q, k, v, keys)


def uniform(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    return attention_file._sdpa(q if keys is not None else 0 * q, k, v, keys)


def test_a_kernel_that_ignores_the_mask_fails_in_its_line_alone(osp: Osp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_file, "_backend", lambda *_: without_mask)
    code, out, err = osp("doctor", "device=cpu", "only=[attention,norms,rotary,matmul,training]")
    made = json.loads(out.splitlines()[-1])
    assert code == 1
    assert states(made["results"], "failed") == ["attention.padded"]
    assert err == f"osp doctor: 1 of {len(made['results'])} failed: attention.padded"
    (line,) = (line for line in out.splitlines() if line.startswith("failed"))
    assert "tensors are wrong; the worst: " in line
    assert "do not train with it" in line


@pytest.mark.parametrize(
    ("kernel", "line", "said"),
    [
        (with_short_mask, "attention.padded", "700 keys, padded"),
        (wrong_backward, "attention.plain", "gradient of keys at"),
        (uniform, "attention.plain", "tensors are wrong"),
    ],
)
def test_a_kernel_that_is_wrong_at_times_fails_in_its_line_alone(
    kernel: Any, line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_file, "_backend", lambda *_: kernel)
    results = {result.name: result for result in examine(subject(tmp_path), ["attention"])}
    assert [result.name for result in results.values() if result.state == "failed"] == [line]
    assert said in results[line].detail


def squared(x: Tensor) -> Tensor:
    return x * x


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda x: 1.2 * x * x, "result at two"),
        (lambda x: HalfGradient.apply(x) * x, "gradient of input at two"),
        (lambda x: x * x / (x.sum() * 0), "difference inf"),
        (lambda x: F.conv1d(x, x), "cases are refused: two"),
    ],
)
def test_any_wrong_kernel_is_told(run: Callable[[Tensor], Tensor], said: str) -> None:
    right = Kernel("one", squared, squared, (drawn(5, 7),), ("input",))
    assert check_kernels("x", [right], CPU, "mend").state == "passed"
    result = check_kernels("x", [right, Kernel("two", run, squared, (drawn(5, 7),), ("input",))], CPU, "mend")
    assert (result.state, result.mend) == ("failed", "mend")
    assert said in result.detail


def test_gradients_of_a_model_are_compared_as_a_whole() -> None:
    right = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert steps.apart(right, right) == 0
    assert steps.apart({"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([4.0])}, right) == pytest.approx(1)


def with_versions(**changed: str | None) -> Callable[[str], str | None]:
    names = {key.replace("_", "-"): value for key, value in changed.items()}
    return lambda package: names.get(package, installed_version(package))


@pytest.mark.parametrize(
    ("package", "changed", "said"),
    [
        ("lightning", {"lightning": "2.6.3"}, "malicious code"),
        ("lightning", {"lightning": "2.6.5"}, "can run code from a checkpoint"),
        ("lightning", {"lightning": None}, "is not installed"),
        ("torch", {"torch": "2.8.0+cu128"}, "is older than 2.9"),
        ("torchvision", {"torch": "2.10.1", "torchvision": "0.28.0"}, "which goes with 0.25"),
        ("numpy", {"numpy": "1.24.4"}, "at least 1.26 is needed"),
        ("hydra-core", {"hydra_core": "1.3.0.dev1"}, "cannot compose"),
    ],
)
def test_a_bad_version_is_told(package: str, changed: dict[str, str | None], said: str) -> None:
    least = {"numpy": "1.26"}.get(package, "")
    result = versions.package_line(package, with_versions(**changed), least)
    assert result.state == "failed"
    assert said in result.detail
    assert "pip install" in result.mend or package == "torch"
    assert versions.package_line(package, installed_version, least).state == "passed"


def test_a_torchvision_that_is_built_for_another_device_is_a_warning() -> None:
    builds = with_versions(torch="2.13.0+cu130", torchvision="0.28.0+cpu")
    assert versions.package_line("torchvision", builds, "").state == "warning"


def test_packages_that_are_missing_or_old_are_told_together() -> None:
    missing = versions.others(with_versions(lpips=None, scipy=None))
    assert (missing.state, missing.mend) == ("failed", "pip install lpips scipy")
    old = versions.others(with_versions(rich="12.1"))
    assert (old.state, old.detail, old.mend) == ("failed", "too old: rich 12.1", "pip install 'rich>=13'")
    assert versions.optional(with_versions(wandb="1.0")).state == "passed"


GPU = {"nvidia_driver": "580.1", "cuda_driver": "13.0", "cuda_build": "13.0", "usable": {"cuda": 8}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cuda_build": None}, "torch is built without CUDA"),
        ({"cuda_driver": "12.8"}, "for CUDA up to 12.8, and torch is built for 13.0"),
        ({"usable": {"cuda": 0}}, "torch sees no GPU"),
    ],
)
def test_a_driver_that_does_not_go_with_torch_is_told(changed: dict[str, Any], said: str) -> None:
    result = drivers.cuda(Drivers(**GPU | changed))
    assert (result.state, bool(result.mend)) == ("failed", True)
    assert said in result.detail
    assert drivers.cuda(Drivers(**GPU)).state == "passed"


def test_another_nccl_than_that_of_torch_is_a_warning() -> None:
    found = Drivers(**GPU, nccl="2.27.5")
    assert drivers.nccl(found, {"nvidia-nccl-cu12": "2.26.2"}.get).state == "warning"
    assert drivers.nccl(found, {"nvidia-nccl-cu12": "2.27.5"}.get).state == "passed"


@pytest.mark.parametrize(
    ("torch_npu", "found", "said"),
    [
        ("2.12.0", {"usable": {"npu": 8}}, "torch-npu 2.12.0 does not go with torch 2.13.0+cpu"),
        ("2.13.0", {"npu_error": "libhccl.so: no such file"}, "cannot be imported: libhccl.so"),
        ("2.13.0", {"usable": {"npu": 0}}, "sees no device"),
        (None, {"ascend_devices": 8}, "there are 8 Ascend devices, and torch-npu is not installed"),
    ],
)
def test_a_torch_npu_that_does_not_work_is_told(torch_npu: str | None, found: dict[str, Any], said: str) -> None:
    result = drivers.torch_npu(Drivers(**found), with_versions(torch_npu=torch_npu, torch="2.13.0+cpu"))
    assert (result.state, bool(result.mend)) == ("failed", True)
    assert said in result.detail
    assert drivers.cann(Drivers(ascend_devices=1), with_versions()).state == "failed"
    good = Drivers(usable={"npu": 8}, cann="8.3.RC1")
    installed = with_versions(torch_npu="2.13.0", torch="2.13.0")
    assert drivers.torch_npu(good, installed).state == drivers.cann(good, installed).state == "passed"


def test_limits_of_a_machine_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = machine.shared_memory(64 << 20, workers=2)  # what Docker gives
    assert (few.state, "--shm-size" in few.mend) == ("failed", True)
    assert machine.shared_memory(8 << 30, workers=2).state == "passed"
    assert [machine.open_files(limit).state for limit in (256, 1024, 65536, -1)] == [
        *("failed", "warning", "passed", "passed")
    ]
    assert [
        machine.clock(*times).state for times in ((100.0, 100.5, 50.0), (40.0, 40.0, 50.0), (100.0, 60.0, 50.0))
    ] == [*("passed", "failed", "warning")]
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("", (), {"free": 1 << 20}))
    full = machine.disk("host.disk_runs", tmp_path / "not" / "there", wanted=20)
    assert (full.state, str(tmp_path) in full.detail) == ("failed", True)


def test_a_device_that_is_slower_than_its_neighbours_is_a_warning() -> None:
    usual = {"float32": 1e13, "memory": 2e12}
    results = list(speed.compared({"x:0": usual, "x:1": usual | {"memory": 1e12}, "x:2": usual}))
    assert [result.state for result in results] == ["passed", "warning", "passed"]
    assert "50% of its neighbours in memory" in results[1].detail


def test_an_exchange_that_hangs_ends_at_the_limit_and_one_that_is_wrong_is_told() -> None:
    operations = {"wrong": exchanges.wrong, "hang": exchanges.hang, "broadcast": OPERATIONS["broadcast"]}
    start, wrong, hang, after = exchange.exchanged([CPU] * 2, 2.0, operations)
    assert start.state == "passed"
    assert (wrong.state, "8 of 8 values are wrong in bfloat16" in wrong.detail) == ("failed", True)
    assert (hang.state, dict(hang.measured)) == ("failed", {"hung": True})
    assert "no answer within 2 s from process 0, 1 of 2" in hang.detail
    assert "GLOO_SOCKET_IFNAME" in hang.mend
    assert after.state == "not applicable"
    assert not multiprocessing.active_children()


def test_one_device_has_nobody_to_exchange_with(tmp_path: Path) -> None:
    alone = replace(subject(tmp_path), devices=[torch.device("meta")])  # any device that is not the CPU
    (result,) = exchange.check_collectives(alone)
    assert result.state == "not applicable"


def test_a_process_that_dies_is_told() -> None:
    *_, died = exchange.exchanged([CPU] * 2, 20.0, {"die": exchanges.die})
    assert (died.state, "process 1 of 2 died" in died.detail) == ("failed", True)


def subject(folder: Path) -> Subject:
    return Subject([CPU], folder, workers=0, limit=5.0, head_dims=[48], vae_channels=[128])


def test_a_check_that_breaks_is_an_answer_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Subject) -> Any:
        yield Result("rotary.first", "passed", "")
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr("osp.audit.doctor.layers.check_rotary", broken)
    monkeypatch.setitem(CHECKS, "norms", "no_such_package.check")
    results = list(examine(subject(tmp_path), ["norms", "rotary", "matmul"]))
    assert [(result.name, result.state) for result in results] == [
        ("norms.check", "failed"),
        ("rotary.first", "passed"),
        ("rotary.check", "failed"),
        ("matmul.linear", "passed"),
    ]
    assert "needs no_such_package" in results[0].detail
    assert results[2].detail == "RuntimeError: the device is gone"


def test_a_disk_that_loses_what_was_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = list(steps.check_checkpoint(subject(tmp_path / "runs")))
    assert [(one.name, one.state) for one in good] == [("checkpoint.file", "passed"), ("checkpoint.pieces", "passed")]
    assert [*tmp_path.iterdir()] == []
    read, index = steps.open_checkpoint, steps.write_index

    def changed(path: Path) -> Any:
        weights = {key: value.clone() for key, value in read(path)["state_dict"].items()}
        next(iter(weights.values())).view(-1)[0] += 1
        return {"state_dict": weights}

    def spoiled(folder: Path, *arguments: Any) -> None:
        index(folder, *arguments)
        with open(folder / "rank-00001.safetensors", "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"lost")

    monkeypatch.setattr(steps, "open_checkpoint", changed)
    monkeypatch.setattr(steps, "write_index", spoiled)
    file, pieces = steps.check_checkpoint(subject(tmp_path / "runs"))
    assert (file.state, "1 tensors are not what was written" in file.detail) == ("failed", True)
    assert (pieces.state, "rank-00001.safetensors" in pieces.detail) == ("failed", True)
    assert "its checksum is another" in pieces.detail
    (tmp_path / "file").touch()
    (refused,) = steps.check_checkpoint(subject(tmp_path / "file"))
    assert (refused.state, str(tmp_path / "file") in refused.detail) == ("failed", True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["only=[speeds]"], "only=speeds: is not known; choose versions, drivers"),
        (["only=[speed]", "skip=[speed]"], "leaves no check"),
        (["device=cpu", "devices=[1]"], "devices=1: is not known; choose 0"),
        (["devices=[]"], "leaves none"),
        (["limit=0"], "limit=0: must be a number above 0"),
        (["workers=-1"], "workers=-1: must be a whole number of at least 0"),
        (["device=cuda:99"], "device=cuda:99: "),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_asked(settings: list[str], said: str, osp: Osp) -> None:
    code, out, err = osp("doctor", *settings)
    assert (code, out) == (2, "")
    assert said in err
