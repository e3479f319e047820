"""Released folders as they lie on the hub: a denoiser in a folder of its own beside the VAE's, imported together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from osp.checks import check_choice
from osp.errors import DataError
from osp.weights.families import find_kind
from osp.weights.folders import TORCH_SUFFIXES, read_config
from osp.weights.pretrained import save_pretrained
from osp.weights.published import Opened, open_published

_GIVEN_FRAMES = ("i2v", "inpaint")  # in the names of folders
_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True)
class Release:
    """A released denoiser and its VAE, as kinds of `osp.weights.families`.

    `folder` is that of the denoiser on the hub, None where that is not known. `settings` are the denoiser's where no
    `config.json` says them, beyond those that all of its kind have.
    """

    denoiser: str
    vae: str
    folder: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def _latte(kind: str, folder: str, side: int, frames: int) -> Release:
    size = {"sample_size": [side // 8, side // 8], "video_length": (frames - 1) // 4 + 1}
    return Release(kind, "causalvae", folder, size)


def _v12(folder: str, frames: int, height: int, width: int, scale: tuple[float, float] = (1.0, 1.0)) -> Release:
    size = {"sample_size": [height // 8, width // 8], "sample_size_t": (frames - 1) // 4 + 1}
    scales = dict(
        zip(("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w"), (1.0, *scale), strict=True)
    )
    kind = "opensora_inpaint_v12" if "i2v" in folder else "opensora_v12"
    return Release(kind, "causalvae", folder, size | scales)


RELEASES: Mapping[str, Release] = {
    "opensora_v10_17x256": _latte("latte_v10", "17x256x256", 256, 17),
    "opensora_v10_65x256": _latte("latte_v10", "65x256x256", 256, 65),
    "opensora_v10_65x512": _latte("latte_v10", "65x512x512", 512, 65),
    "opensora_v11_65x512": _latte("latte_v11", "65x512x512", 512, 65),
    "opensora_v11_221x512": _latte("latte_v11", "221x512x512", 512, 221),
    "opensora_v12_1x480p": _v12("1x480p", 1, 480, 640),
    "opensora_v12_93x480p": _v12("93x480p", 93, 480, 640),
    "opensora_v12_29x720p": _v12("29x720p", 29, 720, 1280, (1.5, 2.0)),
    "opensora_v12_93x720p": _v12("93x720p", 93, 720, 1280, (1.5, 2.0)),
    "opensora_inpaint_v12_93x480p": _v12("93x480p_i2v", 93, 480, 640),
    "opensora_v13": Release("opensora_v13", "wfvae_v13"),
    "opensora_inpaint_v13": Release("opensora_inpaint_v13", "wfvae_v13"),
    "suv_v15": Release("ummdit_v15", "wfvae_v15"),
}
"""The released folders, each by the name of its generator in `conf/generator`."""


def import_release(
    name: str,
    source: str | Path,
    output: str | Path,
    dtype: torch.dtype | str = torch.float32,
    folders: Mapping[str, str | None] | None = None,
) -> dict[str, Opened]:
    """The parts of a release by name, written to `output/denoiser` and `output/vae` as folders of `load_pretrained`.

    `source` is the folder that holds both; `folders` may name where in it the `denoiser` and the `vae` are. `dtype` is
    that of the denoiser's weights; the VAE stays in float32. Raises UsageError for a release that is not known,
    DataError for a source without its parts, and errors as `open_published`, all before anything is written.
    """
    check_choice("release", name, RELEASES)
    release, source, chosen = RELEASES[name], Path(source), dict(folders or {})
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the one that holds the denoiser's folder and the VAE's")
    denoiser = _chosen(source, "denoiser", chosen) or _denoiser(source, release)
    vae = _chosen(source, "vae", chosen) or _only(source, "vae", _vaes(source))
    opened = {
        "denoiser": open_published(release.denoiser, denoiser, _settings(release, denoiser), dtype),
        "vae": open_published(release.vae, vae),
    }
    for part, one in opened.items():
        save_pretrained(one.model, Path(output) / part, one.further_settings, one.weights)
    return opened


def _settings(release: Release, place: Path) -> dict[str, Any] | None:
    """The settings of the denoiser, where no configuration lies beside its weights."""
    if not release.settings or read_config(place) is not None:
        return None
    return {**find_kind(release.denoiser)[1].full_sizes[0], **release.settings}


def _chosen(source: Path, part: str, chosen: Mapping[str, str | None]) -> Path | None:
    if chosen.get(part) is None:
        return None
    place = source / str(chosen[part])
    if not place.exists():
        raise DataError(f"folders.{part}={chosen[part]}: {source} has no such folder or file")
    return place


def _denoiser(source: Path, release: Release) -> Path:
    if release.folder is not None and (source / release.folder).is_dir():
        return source / release.folder
    if release.folder is not None:
        return _only(source, "denoiser", [], release.folder)
    vaes, given_frames = _vaes(source), "inpaint" in release.denoiser
    others = [place for place in _places(source) if place not in vaes and not _is_text_encoder(place)]
    named = [one for one in others if any(word in one.name for word in _GIVEN_FRAMES) == given_frames]
    return _only(source, "denoiser", others if len(others) == 1 else named)


def _vaes(source: Path) -> list[Path]:
    if (source / "vae").is_dir():
        return [source / "vae"]
    return [place for place in _places(source) if "vae" in place.name.lower()]


def _places(source: Path) -> list[Path]:
    """The folders in a folder, and its own weight files."""
    return [one for one in sorted(source.iterdir()) if one.is_dir() or one.suffix in _WEIGHTS]


def _is_text_encoder(place: Path) -> bool:
    config = read_config(place) if place.is_dir() else None
    return place.name.startswith("tokenizer") or "model_type" in (config or {})


def _only(source: Path, part: str, found: list[Path], named: str | None = None) -> Path:
    if len(found) == 1:
        return found[0]
    what = f"several folders that may be the {part}'s" if found else f"no folder of the {part}"
    there = ", ".join(one.name for one in found or _places(source)) or "nothing"
    wanted = f" ({named})" if named else ""
    raise DataError(f"{source}: holds {what}{wanted}, but {there}; name it by folders.{part}=NAME")
