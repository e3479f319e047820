"""Training in several processes: the same losses and weights in every layout as in one process."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from processes import Processes
from torch import nn

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.media.video import to_float
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer
from osp.diffusion import Flow
from osp.parallel import ReplicatedStrategy, ShardedStrategy, local, whole
from osp.training import vae_module
from osp.training.denoiser_module import DenoiserModule
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec

CLIPS, STEPS = 4, 20  # clips in a step of all processes
TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
LAYOUTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "ddp": (2, lambda: ReplicatedStrategy()),
    "fsdp": (2, lambda: ShardedStrategy()),
    "gathered": (2, lambda: ShardedStrategy(reshard_after_forward=False, prefetch=2, offload_optimizer=True)),
    "sequence": (2, lambda: ReplicatedStrategy(sequence=2)),
    "sequence of four": (4, lambda: ReplicatedStrategy(sequence=4)),
    "hybrid, sequence": (4, lambda: ShardedStrategy(sequence=2, replicas=2)),
}


class SmoothDiscriminator(PatchDiscriminator):
    """One whose gradients do not jump; see `test_a_run_is_that_of_one_process`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, nn.LeakyReLU):
                self.layers[number] = nn.SiLU()


@contextmanager
def in_double(wanted: bool) -> Iterator[None]:
    """Weights and clips are double inside, if that is wanted."""
    before = torch.get_default_dtype(), vae_module.to_float
    if wanted:
        torch.set_default_dtype(torch.float64)
        vae_module.to_float = lambda video: to_float(video).double()
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        vae_module.to_float = before[1]


def new_vae() -> WFVAE:
    return WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)


def new_module(kind: str) -> TrainingModule:
    """One whose trained models have no memory yet."""
    torch.manual_seed(3)
    if kind != "denoiser":
        with torch.device("meta"):
            against = SmoothDiscriminator if kind == "vae in single" else PatchDiscriminator
            vae, discriminator = new_vae(), against(width=4, layers=2, dropout=0.0)
        rates: dict[str, Any] = {"lr": 1e-5 if kind == "vae in single" else 1e-3, "ema_decay": 0.9}
        return VAEModule(vae, VAELoss(), discriminator=discriminator, discriminator_start=2, **rates)
    codec = LatentCodec(new_vae(), 0.0, 1.0)
    with torch.device("meta"):
        text = WordText(channels=8, pooled_channels=None, layers=2, heads=2)
        sizes = {"channels": 4, "out_channels": 4, "heads": 4, "head_dim": 6, "text_channels": 8}
        denoiser = CrossTransformer(stages=[{"blocks": 1}, {"blocks": 2, "pattern": "skiparse", "k": 2}], **sizes)
    rates = {"lr": 1e-2, "ema_decay": 0.9, "recompute_every": 2}
    return DenoiserModule(denoiser, text, Flow(shift=1.0), codec=codec, **rates)


class Losses(Callback):
    """Remembers the loss of each step."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.all.append(trainer.callback_metrics["train/loss"].item())


def trained(kind: str, layout: str | None, folder: Path) -> dict[str, Any]:
    """Losses, outcome of the validation, and all weights at the end, of one process of a run."""
    warnings.filterwarnings("ignore")
    losses, many, data_ranks = Losses(), dict[str, Any](), 1
    if layout is not None:
        count, strategy = LAYOUTS[layout]
        many = {"strategy": strategy(), "devices": count}
        data_ranks = count // many["strategy"].sequence
    side = 32 if kind == "denoiser" else 16
    source, val = (SyntheticClips(clips, 5, side, side, seed=seed) for seed, clips in enumerate((8, 4)))
    data = ClipDataModule(source, val, batch_size=CLIPS // data_ranks, val_batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        callbacks=[losses],
        default_root_dir=folder,
        **many,
    )
    with in_double(kind == "vae"):
        module = new_module(kind)
        trainer.fit(module, data)
    values = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {
        "losses": losses.all,
        "score": trainer.callback_metrics[module.monitor].item(),
        "weights": {key: whole(value).clone() for key, value in values.items()},
        "held": sum(local(value).numel() for value in module.parameters()),
        "all": sum(value.numel() for value in module.parameters()),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The run of one process by the kind of module, made when it is first asked for."""
    made = dict[str, dict[str, Any]]()

    def run(kind: str) -> dict[str, Any]:
        if kind not in made:
            made[kind] = trained(kind, None, tmp_path_factory.mktemp("alone"))
        return made[kind]

    return run


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("denoiser", layout) for layout in LAYOUTS),
        *(("vae", "ddp"), ("vae", "fsdp"), ("vae in single", "ddp"), ("vae in single", "fsdp")),
    ],
)
def test_a_run_is_that_of_one_process(
    processes: Processes, alone: Callable[[str], dict[str, Any]], tmp_path: Path, kind: str, layout: str
) -> None:
    """All losses are within 1e-5 of those of one process, which a VAE with its own discriminator holds in double alone.

    The weight of its adversarial loss is a ratio of gradients, and a discriminator's gradient jumps where a unit before
    a leaky ReLU changes its sign. Rounding is enough for that, in one process as well. In float32, with clips of 32x32
    and a rate of 1e-5, the losses of DDP were within 6e-6 for 19 steps; in the one after that one unit of 8192 lay at
    -2.0e-5 instead of 2.5e-5, the weight was off by 7e-4 and the loss by 5e-4. Over 20 steps and three seeds DDP and
    FSDP2 were off by 3e-7 to 5e-4; one process with its clips in another order by 6e-6 to 1e-4, and with two threads by
    2e-5 to 3e-3. With a smooth activation in its place the same runs of DDP and FSDP2 were off by 4e-7 at most, and
    that is held here in float32. It takes a small rate too: at 1e-3 the first steps of Adam, as large for gradients
    that are rounding alone, part a VAE from itself by 2e-3 even without a discriminator, clips in another order.
    """
    count, _ = LAYOUTS[layout]
    ran, one = processes.run(count, trained, kind, layout, tmp_path, group=False), alone(kind)
    for run in ran:
        assert run["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert run["score"] == pytest.approx(one["score"], rel=1e-5)
        replicated = layout == "ddp" or layout.startswith("sequence")
        assert run["held"] == run["all"] if replicated else run["held"] < 0.51 * run["all"]
    for key, value in one["weights"].items() if kind == "vae" else ():  # keys' biases have no gradient but rounding
        assert torch.allclose(ran[0]["weights"][key], value, atol=1e-6), key
