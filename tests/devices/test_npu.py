"""The plugin for NPUs where there is none: messages, and what is read from settings. tests/fakenpu has the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry

from osp.devices import choose_device, choose_kernels
from osp.devices.device import placed_trainer
from osp.devices.npu import NPUAccelerator, accelerator, driver, missing
from osp.devices.npu.precision import on_npu
from osp.errors import UsageError

SOURCE = Path(__file__).parents[2] / "src"

pytestmark = pytest.mark.skipif(missing() is None, reason="this machine has torch-npu")


def test_names_are_registered_on_import() -> None:
    assert "npu" in AcceleratorRegistry.available_accelerators()
    assert {"npu", "npu_ddp", "npu_fsdp2"} <= {*StrategyRegistry.available_strategies()}


@pytest.mark.parametrize(
    ("devices", "numbers"),
    [(1, [0]), (2, [0, 1]), ("2", [0, 1]), (-1, [0, 1, 2, 3]), ("-1", [0, 1, 2, 3]), ("2,", [2]), ("3,1", [3, 1])],
)
def test_devices_are_numbers(devices: str | int, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 4)
    assert NPUAccelerator.parse_devices(devices) == numbers
    assert NPUAccelerator.parse_devices(numbers) == numbers


@pytest.mark.parametrize("devices", [5, "5", [4], [0, 0], "0,0", "two", "", [], True, [True], [0.0], None, -2])
def test_devices_that_are_not_there_are_refused(devices: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "device_count", lambda: 4)
    with pytest.raises(MisconfigurationException, match=r"this process sees 4 NPUs; .*ASCEND_RT_VISIBLE_DEVICES"):
        NPUAccelerator.parse_devices(devices)  # type: ignore[arg-type]


def test_mixed_precision_becomes_that_of_the_npu_and_other_precision_stays() -> None:
    mixed = on_npu(MixedPrecision("bf16-mixed", "cuda"))
    assert isinstance(mixed, MixedPrecision)
    assert (mixed.device, mixed.precision) == ("npu", "bf16-mixed")
    plain = Precision()
    assert on_npu(plain) is plain
    assert on_npu(mixed) is mixed


def test_without_the_package_one_line_says_so() -> None:
    assert missing() == "torch-npu is not installed; install the release that has the version of torch"
    with pytest.raises(RuntimeError, match="torch-npu is not installed"):
        driver()
    with pytest.raises(UsageError, match=r"device=npu: needs the package torch-npu \(pip install 'osp\[npu\]'\)"):
        placed_trainer("npu", "auto", 1)


def test_auto_takes_a_device_that_is_there_and_leaves_other_settings_alone() -> None:
    here = choose_device("auto").type
    assert here == ("cuda" if torch.cuda.is_available() else "cpu")
    assert placed_trainer("auto", "auto", 1) == {"accelerator": here, "strategy": "auto"}
    assert placed_trainer("gpu", {"_target_": "mine"}, 2) == {"accelerator": "gpu"}


def test_kernels_are_chosen_by_name() -> None:
    with pytest.raises(UsageError, match="kernels=quick: is not known; choose plain or fused"):
        choose_kernels("quick")


@pytest.fixture(scope="module")
def without_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with torch-npu as it behaves where Ascend's libraries are missing: torch would import it with itself."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "torch_npu.py").write_text('raise ImportError("libhccl.so: cannot open shared object file")\n')
    about = folder / "torch_npu-2.13.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (about / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def said(folder: Path, code: str, **variables: str) -> str:
    """The last line of what a process prints that finds the folder's packages beside ours."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment |= {"PYTHONPATH": f"{SOURCE}{os.pathsep}{folder}"} | variables
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    return (process.stdout + process.stderr).strip().splitlines()[-1]


def test_the_package_without_a_driver_costs_one_clear_line_and_only_where_an_npu_is_asked_for(
    without_driver: Path,
) -> None:
    code = (
        "from osp.devices import choose_device; from osp.errors import UsageError\n"
        "print(choose_device('auto'))\n"
        "try: choose_device('npu')\n"
        "except UsageError as error: print(error)"
    )
    line = said(without_driver, code)
    assert line.startswith("device=npu: torch-npu is installed but cannot be used (libhccl.so: cannot open shared")
    assert line.endswith("Ascend's driver and libraries (CANN) must be found: source their set_env.sh first")


def test_where_torch_itself_cannot_be_imported_the_plugin_says_how(without_driver: Path) -> None:
    shutil.copytree(SOURCE / "osp" / "devices" / "npu", without_driver / "ascend")
    line = said(without_driver, "import ascend", TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert line.startswith("ImportError: import torch fails: torch-npu is installed, but Ascend's driver")
    assert "set the environment variable TORCH_DEVICE_BACKEND_AUTOLOAD=0" in line
