"""A few real steps of tiny models on each device, their gradients against float64 on the CPU, and a checkpoint."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.audit.doctor.kernels import drawn
from osp.audit.doctor.result import Result, failed, passed
from osp.audit.doctor.subject import Subject
from osp.devices import autocast_dtype, fast_precision
from osp.vae import WFVAE
from osp.weights.families import FAMILIES
from osp.weights.files import WeightImportError, open_checkpoint
from osp.weights.lazy import Stored
from osp.weights.sharded import Piece, open_sharded, write_index, write_shard

_STEPS, _RATE = 4, 2e-4
_WRITERS = 2  # pieces of a sharded checkpoint
_WIDTHS = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 48, "text_channels": 32}
_FLOWS = {"encoder_flow_channels": 16, "decoder_flow_channels": 16}
_STAGES: list[Mapping[str, Any]] = [{"blocks": 1}, {"blocks": 2, "pattern": "skiparse", "k": 2}, {"blocks": 1}]
_BARS = {"32-true": 2e-3, "bf16-mixed": 0.15, "16-mixed": 0.05}
"""The largest difference of all gradients together from float64, in units of their norm: a layer adds to the last's."""
_MEND = "look at the lines above: a kernel that fails explains it; else report it, with this report"
_DISK = "choose a folder on a disk that keeps what is written, and look at the system's log for errors of the disk"

Loss = Callable[[nn.Module, torch.device, torch.dtype], Tensor]


def check_training(subject: Subject) -> Iterator[Result]:
    """Lines for each family of denoisers and for the VAE on each device."""
    for device in subject.devices:
        for name, (make, loss) in _MODELS.items():
            yield _trained(f"training.{name}", make(), loss, device)


def check_checkpoint(subject: Subject) -> Iterator[Result]:
    """Lines for a checkpoint from the first device, written to the folder of runs and read: one file, and in pieces."""
    model = _cross().to(subject.device)
    made = [one for one in (subject.folder, *subject.folder.absolute().parents) if not one.exists()]
    try:
        subject.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=subject.folder, prefix=".doctor-") as folder:
            yield _written_and_read(model, Path(folder) / "file.ckpt")
            yield _in_pieces_and_read(model, Path(folder) / "folder.ckpt")
    except OSError as error:
        yield failed("checkpoint.folder", f"{subject.folder}: {error.strerror or error}", _DISK)
    except WeightImportError as error:
        yield failed("checkpoint.folder", f"what was written cannot be read: {error}", _DISK)
    finally:
        for one in made:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()


def denoiser_loss(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The squared error of a prediction, with padding in the text."""
    latent, target = (drawn(2, 4, 3, 8, 8, seed=seed).to(device, dtype) for seed in (1, 2))
    text, pooled = drawn(2, 9, 32, seed=3).to(device, dtype), drawn(2, 32, seed=4).to(device, dtype)
    mask = torch.arange(9, device=device) < torch.tensor([[9], [5]], device=device)
    return (model(latent, torch.tensor([0.2, 0.7], device=device), text, mask, pooled) - target).square().mean()


def vae_loss(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The squared error of what the latent's mean gives back."""
    assert isinstance(model, WFVAE)
    video = drawn(1, 3, 5, 32, 32, seed=5).clamp(-1, 1).to(device, dtype)
    return (model.decode(model.encode(video).mode()) - video).square().mean()


def gradients(model: nn.Module, loss: Loss, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient of each parameter, in float64 on the CPU."""
    model.zero_grad()
    loss(model, device, dtype).backward()
    return {
        key: parameter.grad.detach().cpu().double()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of all differences, in units of the norm of all that is right."""
    wrong = sum(float((ours[key] - value).square().sum()) for key, value in theirs.items())
    return (wrong / sum(float(value.square().sum()) for value in theirs.values())) ** 0.5


def _trained(name: str, model: nn.Module, loss: Loss, device: torch.device) -> Result:
    from osp.training.optimisation import Optimisation  # here: Lightning may be missing

    exact = gradients(copy.deepcopy(model).double(), loss, torch.device("cpu"), torch.float64)
    model, precision = model.to(device), fast_precision(device)
    dtype = autocast_dtype(precision)

    def autocast() -> Any:
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    with autocast():
        difference = apart(gradients(model, loss, device, torch.float32), exact)
    bar, where = _BARS[precision], {"device": str(device)}
    measured: dict[str, Any] = {"precision": precision, "gradient_difference": difference}
    if not difference <= bar:
        detail = f"{precision}: the gradients differ by {difference:.2g} of their norm from float64, bar {bar:g}"
        return failed(name, detail, _MEND, measured=measured, **where)
    optimizer, losses = Optimisation(lr=_RATE).adamw(model.parameters()), []
    for _ in range(_STEPS):
        with autocast():
            error = loss(model, device, torch.float32)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    measured["losses"] = losses
    detail = f"{precision}, {_STEPS} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}"
    if not losses[-1] < losses[0]:
        return failed(name, f"{detail}: it does not fall", _MEND, measured=measured, **where)
    return passed(name, f"{detail}; gradients {difference:.2g} of their norm from float64", measured=measured, **where)


def _written_and_read(model: nn.Module, path: Path) -> Result:
    """Weights and states of an optimiser, as a run of one process writes them."""
    from osp.training.checkpoint_io import AtomicCheckpointIO  # here: Lightning may be missing
    from osp.training.optimisation import Optimisation

    optimizer = Optimisation(lr=_RATE).adamw(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    begun = time.perf_counter()
    AtomicCheckpointIO().save_checkpoint(state, path)
    took = time.perf_counter() - begun
    return _compared("checkpoint.file", model, path, open_checkpoint(path)["state_dict"], took)


def _in_pieces_and_read(model: nn.Module, path: Path) -> Result:
    """Weights as the processes of a sharded run write them, each some rows of each tensor, and one the index."""
    from osp.training.writing import take_place

    part = path.with_name(f".{path.name}.part")
    part.mkdir()
    begun = time.perf_counter()
    for rank in range(_WRITERS):
        write_shard(part, rank, _rows_of(model, rank))
    write_index(part, _WRITERS, {"global_step": 1})
    take_place(part, path, keep=1)
    took = time.perf_counter() - begun
    return _compared("checkpoint.pieces", model, path, dict(open_sharded(path).weights), took)


def _rows_of(model: nn.Module, rank: int) -> Iterator[Piece]:
    for key, value in model.state_dict().items():
        begin, end = (one * len(value) // _WRITERS for one in (rank, rank + 1)) if value.ndim else (0, 1 - rank)
        if begin < end:
            own = value[begin:end] if value.ndim else value
            yield Piece(key, Stored.of(own), tuple(value.shape), begin)


def _compared(name: str, model: nn.Module, path: Path, read: Mapping[str, Tensor], took: float) -> Result:
    files = [path] if path.is_file() else [*path.iterdir()]
    size = sum(one.stat().st_size for one in files)
    wrong = [key for key, value in model.state_dict().items() if not torch.equal(value.cpu(), read[key])]
    pieces = "" if len(files) == 1 else f", in {_WRITERS} pieces and an index"
    where = f"{size / 1e6:.3g} MB in {path.parent.parent}{pieces}, at {size / took / 1e6:.3g} MB/s"
    measured = {"bytes": size, "bytes_per_second": size / took}
    if wrong:
        return failed(name, f"{where}: {len(wrong)} tensors are not what was written", _DISK, measured=measured)
    return passed(name, f"{where}, written and read back", measured=measured)


def _cross() -> nn.Module:
    return _awake(FAMILIES["cross"].model(stages=_STAGES, **_WIDTHS))


def _joint() -> nn.Module:
    return _awake(FAMILIES["joint"].model(stages=_STAGES, pooled_channels=32, modulation_width=32, **_WIDTHS))


def _vae() -> nn.Module:
    return _awake(WFVAE(latent_channels=4, base_channels=16, encoder_blocks=1, decoder_blocks=1, **_FLOWS))


def _awake(model: nn.Module) -> nn.Module:
    """The model with the same weights every time, none of which is zero, so that all of it takes part."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            scale = 0.7 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            start = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + scale * drawn(*parameter.shape, seed=number))
    return model


_MODELS: Mapping[str, tuple[Callable[[], nn.Module], Loss]] = {
    "cross_denoiser": (_cross, denoiser_loss),
    "joint_denoiser": (_joint, denoiser_loss),
    "vae": (_vae, vae_loss),
}
