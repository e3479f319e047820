"""Training checkpoints (`osp.training.state`), read back as a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from osp.checks import check_number
from osp.conditioning import TextEncoder, WordText
from osp.denoiser import Denoiser
from osp.diffusion import Objective, find_objective
from osp.documents import SIZE, check_form
from osp.errors import DataError, OspError, UsageError
from osp.sampling import VideoGenerator
from osp.training.encode_features import text_identities
from osp.training.state import TrainingCheckpoint, averaged_weights, is_state, open_state
from osp.vae import WFVAE, LatentCodec, VideoVAE
from osp.weights import load_pretrained
from osp.weights.built import build_empty, check_plain, check_types
from osp.weights.families import find_class
from osp.weights.files import check_keys, sound
from osp.weights.lazy import Weights, filled

Model = TypeVar("Model", bound=nn.Module)

_MADE_BY = ({"name": str, "fingerprint": str, "width": SIZE}, None)
_GENERATOR = {
    "denoiser": {"model": str, "settings": dict},
    "text": {"encoder": (str, None), "settings": dict, "made_by?": [_MADE_BY]},
    "objective": {"name": str, "settings": dict},
    "latent": {
        "vae": str,
        "vae_fingerprint": str,
        "shift": [float],
        "scale": [float],
        "origin": (str, None),
        "time_stride?": SIZE,
        "space_stride?": SIZE,
        "latent_channels?": SIZE,
    },
    "fps": float,
    "clip": ({"frames": SIZE, "height": SIZE, "width": SIZE}, None),
    "words?": [str],
}
"""The form of a denoiser's checkpoint's entry on its generator (`DenoiserModule.on_save_checkpoint`)."""

_MOST_FPS = 1000

_GIVE_VAE = "vae=trained vae.path=CHECKPOINT, or vae=pretrained vae.path=FOLDER"
_GIVE_TEXT = "text=NAME text.path=FOLDER"


def load_trained_vae(path: str | Path) -> VideoVAE:
    """The VAE of a training checkpoint, with its averaged weights, in eval mode; read later under a device "meta".

    Raises WeightImportError for a file that is not a readable checkpoint and DataError for one that holds no VAE.
    """
    vae = filled(*open_vae(open_state(path)))
    vae.origin = str(path)
    return vae


def open_vae(state: TrainingCheckpoint, averaged: bool = True) -> tuple[VideoVAE, Weights]:
    """The VAE of a training checkpoint, without memory, and its weights: the averaged ones, or those of the last step.

    Raises DataError for a checkpoint that holds no VAE, and WeightImportError for weights that do not fit.
    """
    path = state.path
    settings = state.entry("vae_settings")
    if settings is None:
        if isinstance(state.entry("generator"), dict):
            raise DataError(
                f"{path}: holds a denoiser, where a VAE is wanted; make videos with it by `osp sample`, or judge it by "
                "`osp eval target=generation`"
            )
        raise DataError(f"{path}: holds no VAE trained here; a checkpoint of `osp train` is needed")
    weights = averaged_weights(state) if averaged else state.stored("vae.")
    # Before others could be trained, a checkpoint did not name its VAE.
    name = state.entry("vae_model") or WFVAE.__name__
    kind: type[VideoVAE] = find_class(name, VideoVAE, f"{path}: vae_model", DataError)  # type: ignore[type-abstract]
    return _opened(kind, settings, weights, state, "vae_settings")


def _opened(
    kind: type[Model], settings: Any, weights: Weights, state: TrainingCheckpoint, entry: str
) -> tuple[Model, Weights]:
    """A model without memory, and its weights, if they are all that it has."""
    model = build_empty(kind, settings, len(weights), f"{state.path}: {entry}")
    wanted = model.state_dict()
    check_keys(Weights.of(wanted).shapes, weights, str(state.path))
    return model, sound(weights, wanted, str(state.path))


def load_vae(origin: str | Path) -> VideoVAE:
    """The VAE of a training checkpoint (a file) or of `osp import-weights` (a folder), in eval mode.

    Raises WeightImportError or DataError for anything else.
    """
    if is_state(origin):
        return load_trained_vae(origin)
    vae = load_pretrained(origin)
    if not isinstance(vae, VideoVAE):
        raise DataError(f"{origin}: holds a {type(vae).__name__}, no VAE")
    return vae


def open_generator(path: str | Path) -> tuple[TrainingCheckpoint, dict[str, Any]]:
    """A denoiser's training checkpoint, and what it says of its generator.

    Raises WeightImportError for a file that is not a readable checkpoint and DataError for one without a denoiser.
    """
    state = open_state(path)
    entry = state.entry("generator")
    if not isinstance(entry, dict):
        if state.entry("vae_settings") is not None:
            raise DataError(
                f"{path}: holds a VAE, where a denoiser is wanted; measure it by `osp eval`, or train a "
                "denoiser with it by `osp train module=denoiser`"
            )
        raise DataError(f"{path}: holds no denoiser trained here; a checkpoint of `osp train` with one is needed")
    check_plain(entry, f"{path}: generator")
    check_form(entry, _GENERATOR, f"{path}: generator")
    check_number(f"{path}: generator.fps", entry["fps"], above=0, most=_MOST_FPS, error=DataError)
    for side, value in (entry["clip"] or {}).items():
        check_number(f"{path}: generator.clip.{side}", value, 1, whole=True, error=DataError)
    return state, entry


def open_denoiser(state: TrainingCheckpoint, averaged: bool = True) -> tuple[Denoiser, Weights]:
    """The denoiser of the checkpoint of `open_generator`, as `open_vae`."""
    entry = state.entry("generator")["denoiser"]
    kind = find_class(entry["model"], Denoiser, f"{state.path}: generator.denoiser.model", DataError)
    weights = _trained(state, "denoiser.", averaged)
    return _opened(kind, entry["settings"], weights, state, "generator.denoiser.settings")


def open_text(state: TrainingCheckpoint, averaged: bool = True) -> tuple[WordText, Weights] | None:
    """The text encoder that was trained along, as `open_denoiser`; None if there is none."""
    entry = state.entry("generator")["text"]
    if entry["encoder"] != WordText.__name__:
        return None
    weights = _trained(state, "text.", averaged)
    text, weights = _opened(WordText, entry["settings"], weights, state, "generator.text.settings")
    words = state.entry("generator").get("words")
    text.seen = None if words is None else frozenset(words)
    return text, weights


def _trained(state: TrainingCheckpoint, part: str, averaged: bool) -> Weights:
    return averaged_weights(state, part) if averaged else state.stored(f"model.{part}")


def load_trained_generator(
    path: str | Path, vae: VideoVAE | None = None, text: TextEncoder | None = None
) -> VideoGenerator:
    """The generator of a denoiser's training checkpoint, with averaged weights.

    `vae=None` reads the VAE from where it was read in training; `text=None` needs a text encoder that was trained
    along. Raises UsageError for a VAE or text encoder that is gone or is another than the one in training, and errors
    as `open_generator`.
    """
    state, entry = open_generator(path)
    latent, objective = entry["latent"], entry["objective"]
    if vae is None:
        vae = _stored_vae(path, latent["origin"])
    codec = LatentCodec(vae, latent["shift"], latent["scale"])
    if codec.fingerprint() != latent["vae_fingerprint"]:
        raise UsageError(
            f"{path}: was trained with another VAE ({latent['vae']} of {latent['origin']}) than {vae.origin}; "
            f"give that one: {_GIVE_VAE}"
        )
    return VideoGenerator(
        filled(*open_denoiser(state)),
        _text(state, text),
        _objective(objective, f"{path}: generator.objective"),
        codec,
        fps=entry["fps"],
        clip=entry["clip"],
    )


load_generator = load_trained_generator


def _objective(entry: dict[str, Any], place: str) -> Objective:
    try:
        kind = find_objective(entry["name"])
    except UsageError as error:
        raise DataError(f"{place}: {error}") from error
    objective = build_empty(kind, entry["settings"], 0, f"{place}.settings")
    check_types(objective, f"{place}.settings")
    return objective


def _stored_vae(path: str | Path, origin: str | None) -> VideoVAE:
    if origin is None:
        raise UsageError(f"{path}: does not say where its VAE lies; give {_GIVE_VAE}")
    if not Path(origin).exists():
        raise UsageError(f"{path}: its VAE, {origin}, is gone; give {_GIVE_VAE}")
    try:
        return load_vae(origin)
    except OspError as error:
        raise UsageError(f"{path}: its VAE cannot be read back ({error}); give {_GIVE_VAE}") from error


def _text(state: TrainingCheckpoint, text: TextEncoder | None) -> TextEncoder:
    path, trained = state.path, open_text(state)
    if trained is not None:
        if text is not None:
            raise UsageError(f"{path}: brings the text encoder that was trained along; leave text out")
        return filled(*trained)
    made_by = state.entry("generator")["text"].get("made_by", [])
    names = " and ".join(f"{one['name']} ({one['width']} wide)" for one in made_by if one)
    if text is None:
        raise UsageError(f"{path}: was trained with texts of {names}, which it does not bring; give {_GIVE_TEXT}")
    if [one and asdict(one) for one in text_identities(text)] != made_by:
        raise UsageError(
            f"{path}: was trained with texts of {names}, not of this {text.name}; give that encoder: {_GIVE_TEXT}"
        )
    return text
