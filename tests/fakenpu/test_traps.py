"""The traps that custom accelerators meet in Lightning: what its own parts do there, and what the plugin's do."""

import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.callbacks import DeviceStatsMonitor, ThroughputMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)

from osp.devices import choose_device
from osp.devices.npu import (
    NPUAccelerator,
    NPUDDPStrategy,
    NPUModelParallelStrategy,
    NPURandomState,
    NPUThroughputMonitor,
    driver,
)

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}
QUIET |= {"enable_checkpointing": False, "limit_val_batches": 0}


class BareAccelerator(Accelerator):
    """A custom accelerator that does no more than it must."""

    setup_device = teardown = lambda self, *_: None
    parse_devices = staticmethod(lambda devices: list(range(int(devices))))
    get_parallel_devices = staticmethod(lambda devices: [torch.device("npu", number) for number in devices])
    auto_device_count = staticmethod(lambda: 4)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "bare")


class Watched(BoringModel):
    """Remembers where it trains, and in which type."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = (self.layer.weight.device.type, self.layer(batch).dtype)
        return super().training_step(batch, batch_idx)


def trained(**trainer: Any) -> Watched:
    model = Watched()
    Trainer(**QUIET | {"devices": 1} | trainer).fit(model)
    return model


@pytest.fixture(autouse=True)
def present() -> None:
    """The device has its name."""
    assert choose_device("npu").type == "npu"


def test_one_device_of_a_custom_accelerator_is_the_cpu_without_a_word_and_ours_is_told() -> None:
    assert trained(accelerator=BareAccelerator(), devices=1).seen[0] == "cpu"
    with pytest.raises(MisconfigurationException, match="the strategy puts the model on cpu: give strategy='npu'"):
        trained(accelerator="npu", devices=1)
    assert trained(accelerator="npu", devices=1, strategy="npu").seen[0] == "npu"
    with pytest.raises(MisconfigurationException, match="strategy='npu' is for one device, and 2 were asked for"):
        Trainer(accelerator="npu", devices=2, strategy="npu")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_mixed_precision_is_that_of_cuda_without_a_word_and_ours_is_the_npus() -> None:
    on_npu = {"strategy": SingleDeviceStrategy("npu:0"), "precision": "bf16-mixed"}
    assert trained(accelerator=BareAccelerator(), devices=1, **on_npu).seen == ("npu", torch.float32)
    on_npu["strategy"] = SingleDeviceStrategy("npu:0")
    assert trained(accelerator="npu", devices=1, **on_npu).seen == ("npu", torch.bfloat16)
    assert trained(accelerator="npu", strategy="npu", precision="bf16-mixed").seen == ("npu", torch.bfloat16)


def test_auto_never_takes_it_and_we_do() -> None:
    assert Trainer(**QUIET, accelerator="auto", devices=1).strategy.root_device.type != "npu"
    assert choose_device("auto").type == "npu"


def test_fsdp1_wants_cuda() -> None:
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        Trainer(**QUIET, accelerator="npu", devices=2, strategy=FSDPStrategy())
    Trainer(**QUIET, accelerator="npu", devices=2, strategy="npu_fsdp2")


def test_ddp_takes_a_stream_of_cuda_and_ours_one_of_the_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(strategy: DDPStrategy) -> list[str]:
        """The calls of the driver until the model is wrapped."""
        strategy.parallel_devices = [torch.device("npu", 0)]
        strategy.cluster_environment = lightning.fabric.plugins.environments.LightningEnvironment()
        module = "osp.devices.npu.strategies" if isinstance(strategy, NPUDDPStrategy) else DDPStrategy.__module__
        monkeypatch.setattr(f"{module}.DistributedDataParallel", lambda *_, **__: None)
        driver().calls.clear()
        strategy._setup_model(torch.nn.Linear(2, 2))
        return list(driver().calls)

    with pytest.raises((RuntimeError, AssertionError)):
        built(DDPStrategy())
    assert built(NPUDDPStrategy()) == ["Stream", "stream"]


def test_all_of_a_node_is_tensor_parallel_and_ours_is_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    def mesh(strategy: ModelParallelStrategy) -> list[int]:
        sizes: list[int] = []
        strategy.parallel_devices = [torch.device("npu", number) for number in range(2)]
        strategy.cluster_environment = lightning.fabric.plugins.environments.LightningEnvironment()
        strategy._lightning_module = BoringModel()
        strategy.set_world_ranks()
        monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda self: None)
        monkeypatch.setattr("osp.devices.npu.strategies.unbind_default_group", lambda device: None)
        monkeypatch.setattr(
            "lightning.pytorch.strategies.model_parallel._setup_device_mesh", lambda *given: sizes.extend(given[:2])
        )
        monkeypatch.setattr(ParallelStrategy, "setup_environment", lambda self: None)
        strategy.setup_environment()
        return sizes

    assert mesh(ModelParallelStrategy()) == [1, 2]
    assert mesh(NPUModelParallelStrategy()) == [2, 1]


def test_random_state_statistics_and_throughput_know_cuda_only_and_ours_know_the_npu(tmp_path: Path) -> None:
    assert not [key for key in _collect_rng_states() if "npu" in key]
    assert get_available_flops(torch.device("npu"), torch.bfloat16) is None
    with pytest.raises(NotImplementedError):
        BareAccelerator().get_device_stats(torch.device("npu"))

    stats, logger = DeviceStatsMonitor(cpu_stats=False), CSVLogger(tmp_path)
    trained(accelerator="npu", strategy="npu", callbacks=[stats], logger=logger, log_every_n_steps=1)
    assert "allocated_bytes.all.peak" in Path(logger.log_dir, "metrics.csv").read_text()

    def synchronised(monitor: ThroughputMonitor) -> bool:
        driver().calls.clear()
        trained(accelerator="npu", strategy="npu", callbacks=[monitor], logger=CSVLogger(tmp_path))
        return "synchronize" in driver().calls

    assert not synchronised(ThroughputMonitor(batch_size_fn=len))
    assert synchronised(NPUThroughputMonitor(batch_size_fn=len, available_flops=1e12))
    assert driver().calls.count("empty_cache") >= 2  # at the start, and at teardown


class Drawing(BoringModel):
    """Remembers what it draws on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drawn.append(torch.rand((), device=self.device).item())
        return super().training_step(batch, batch_idx)


def test_random_numbers_of_the_device_go_on_where_a_checkpoint_left_them(tmp_path: Path) -> None:
    def drawn(steps: int, resume: Path | None = None, **trainer: Any) -> list[float]:
        driver().manual_seed_all(random.randrange(1000))
        model = Drawing()
        runner = Trainer(**QUIET | {"max_steps": steps, "devices": 1}, accelerator="npu", strategy="npu", **trainer)
        runner.fit(model, ckpt_path=resume, weights_only=False)
        runner.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return model.drawn

    drawn(2, callbacks=[NPURandomState()])
    state = torch.load(tmp_path / "2.ckpt", map_location="cpu", weights_only=False)["callbacks"]["NPURandomState"]
    (kept,) = state["states"]
    driver().set_rng_state(kept, 0)
    wanted = [torch.rand((), device="npu:0").item() for _ in range(2)]
    assert drawn(4, tmp_path / "2.ckpt", callbacks=[NPURandomState()]) == wanted
    assert drawn(4, tmp_path / "2.ckpt") != wanted


def test_a_strategy_of_ones_own_counts_as_one_process_and_ours_do_not() -> None:
    class Own(ParallelStrategy):
        """A strategy that derives from neither DDP nor ModelParallel."""

        barrier = model_to_device = lambda self, *_: None
        broadcast = reduce = lambda self, value, *_, **__: value
        root_device = torch.device("npu", 0)

    def is_distributed(strategy: Any) -> bool:
        return Trainer(**QUIET, accelerator="npu", devices=2, strategy=strategy)._accelerator_connector.is_distributed

    assert not is_distributed(Own())
    assert is_distributed("npu_ddp")
    assert is_distributed("npu_fsdp2")


def test_names_are_there_after_the_import() -> None:
    assert AcceleratorRegistry["npu"]["accelerator"] is NPUAccelerator
    assert MixedPrecision("bf16-mixed", "npu").device == "npu"
