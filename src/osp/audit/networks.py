"""Networks and wavelets against recorded cases: VAEs, denoisers, and the key lists of full-size checkpoints."""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.audit.case import Case, Comparison, Unknown, Unsupported, difference
from osp.audit.faults import known_fault, model_kind
from osp.denoiser import Denoiser
from osp.errors import DataError, UsageError
from osp.vae import VideoVAE
from osp.vae.wavelet import PUBLISHED_SCALE_3D, haar2d, haar3d, inverse_haar2d, inverse_haar3d
from osp.weights import load_published
from osp.weights.families import FAMILIES
from osp.weights.lazy import Weights
from osp.weights.published import Candidate

# Ours -> theirs
_INPUTS = {
    "latent": "hidden_states",
    "time": "timestep",
    "text": "encoder_hidden_states",
    "text_mask": "encoder_attention_mask",
    "pooled_text": "pooled_projections",
    "video_mask": "attention_mask",
}
_NEEDED = ("latent", "time", "text")
_ONE_TEXT = {"text": 3, "text_mask": 2, "pooled_text": 2}  # dimensions; published code may give one more, of size 1
_LEAST_DECODED = 1e-4


def load(case: Case, config: Any = None) -> nn.Module:
    """The model of a case, or of another configuration. Raises Unsupported for settings that we do not build."""
    config = case.setting("config") if config is None else config
    if not isinstance(config, Mapping):
        raise DataError(f"{case.folder / case.name}.json: config is no object")
    try:
        return load_published(model_kind(case), case.below("weights/"), config).to(case.device)
    except UsageError as error:
        raise Unsupported(str(error)) from error


def run_vae(case: Case) -> Iterator[Comparison]:
    """Mean, log variance and reconstruction of each recorded length."""
    vae = load(case)
    assert isinstance(vae, VideoVAE)
    lengths = {*case.setting("Ts"), *(int(n) for key in case.tensors for n in re.findall(r"^in/T(\d+)/", key))}
    for frames in sorted(lengths):
        at = f"T{frames}"
        posterior = vae.encode(case.tensor(f"in/{at}/x"))
        for name, value in (("mean", posterior.mean), ("logvar", posterior.logvar)):
            yield case.compare(f"{at}/{name}", value, case.bar(name, f"{at}/{name}"))
        decoded = vae.decode(case.tensor(f"in/{at}/z"))
        yield case.compare(f"{at}/dec", decoded, case.bar("dec", f"{at}/dec", least=_LEAST_DECODED))


def run_denoiser(case: Case) -> Iterator[Comparison]:
    """The prediction for each recorded set of inputs, and what the recorded blocks give."""
    model = load(case)
    assert isinstance(model, Denoiser)
    for name in recorded_sets(case):
        found = list(_run_set(case, name, model))
        fault = None if all(one.passed for one in found) else known_fault(case, name)
        if fault is None:
            yield from found
            continue
        # As published, fault and all, it must be what is recorded.
        faulty = load(case, fault.config)
        assert isinstance(faulty, Denoiser)
        yield from (one._replace(what=f"{one.what}, {fault.name}") for one in _run_set(case, name, faulty))
        yield max(found, key=lambda one: one.share)._replace(what=name, documented=fault.reason)


def _run_set(case: Case, name: str, model: Denoiser) -> Iterator[Comparison]:
    images = case.setting("input_sets").get(name, {}).get("images", 0)
    prediction, outputs = with_blocks(model, recorded_inputs(case, name) | ({"images": images} if images else {}))
    yield case.compare(f"{name}/sample", prediction, case.bar(f"{name}/sample"))
    bar = case.bar(f"{name}/blocks", f"{name}/sample")
    for place, recorded in case.below(f"out/{name}/block_").items():
        got = _block_output(model, outputs, place)
        if place.endswith("txt"):
            recorded = recorded[:, : got.shape[1]]  # ours is cut to the longest text
        yield difference(f"{name}/block_{place}", got, recorded, bar)


def run_wavelet(case: Case) -> Iterator[Comparison]:
    """The Haar transforms and their inverses, of the published size."""
    made: dict[str, Callable[[], Tensor]] = {
        "haar2d": lambda: haar2d(case.tensor("in/x")),
        "haar3d": lambda: haar3d(case.tensor("in/x"), scale=PUBLISHED_SCALE_3D),
        "inv2d": lambda: inverse_haar2d(case.tensor("in/z2")),
        "inv3d": lambda: inverse_haar3d(case.tensor("in/z3"), scale=PUBLISHED_SCALE_3D),
        "roundtrip2d": lambda: inverse_haar2d(haar2d(case.tensor("in/x"))),
        "roundtrip3d": lambda: inverse_haar3d(
            haar3d(case.tensor("in/x"), scale=PUBLISHED_SCALE_3D), scale=PUBLISHED_SCALE_3D
        ),
    }
    for name, make in made.items():
        yield case.compare(name, make(), case.bar(name))


def run_manifest(path: Path) -> Comparison:
    """How many of a full-size model's keys and shapes differ from those of the family that they are most like.

    Raises Unsupported if a kind of that name does not take the settings, Unknown if there is none, and DataError for a
    manifest that cannot be read.
    """
    config, weights = _manifest(path)
    refused: dict[str, str] = {}
    fits: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        for name, kind in family.kinds.items():
            try:
                candidate = Candidate(family, kind, config, weights, "config")
            except UsageError as error:
                refused[name] = str(error)
                continue
            if 2 * len(candidate.expected.keys() & weights.shapes.keys()) >= len(weights):
                fits.append((candidate.misfits, family.name))
    if fits:
        misfits, name = min(fits)
        return Comparison(f"keys and shapes of the family {name}", misfits, 0)
    # A manifest does not say its kind; manifests of released checkpoints are named after it.
    if named := [name for name in refused if path.name.startswith(name)]:
        raise Unsupported(refused[named[0]])
    raise Unknown("its settings and keys are those of no kind that is known here")


def _manifest(path: Path) -> tuple[dict[str, Any], Weights]:
    """Published settings, and weights of the listed shapes that take no memory."""
    try:
        manifest = json.loads(gzip.decompress(path.read_bytes()))
        config, keys = dict(manifest["config"]), dict(manifest["keys"])
        weights = {key: torch.ones(()).expand(shape) for key, shape in keys.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not keys or manifest.get("n_keys", len(keys)) != len(keys):
        raise DataError(f"{path}: lists {len(keys)} keys and says that there are {manifest.get('n_keys')}")
    return config, Weights.of(weights)


def recorded_sets(case: Case) -> list[str]:
    """The names of the sets of inputs, those that are said to be there and those that are."""
    return sorted({*case.setting("input_sets"), *(key.split("/")[1] for key in case.tensors if key[:3] == "in/")})


def recorded_inputs(case: Case, name: str) -> dict[str, Tensor]:
    """One recorded set, as our models take it. Raises DataError for an input that is missing or that they lack."""
    stored = case.below(f"in/{name}/")
    if unknown := stored.keys() - _INPUTS.values():
        raise DataError(f"{name}: the inputs {', '.join(sorted(unknown))} are not known")
    if missing := [_INPUTS[ours] for ours in _NEEDED if _INPUTS[ours] not in stored]:
        raise DataError(f"{name}: has no {', '.join(missing)}")
    given = {ours: stored[theirs] for ours, theirs in _INPUTS.items() if theirs in stored}
    return {key: value.squeeze(1) if value.ndim > _ONE_TEXT.get(key, 5) else value for key, value in given.items()}


def with_blocks(model: Denoiser, given: Mapping[str, Any]) -> tuple[Tensor, dict[int, Any]]:
    """The prediction, and what each block gave, by its number."""
    outputs: dict[int, Any] = {}

    def keeping(number: int) -> Callable[[Any, Any, Any], None]:
        return lambda _, __, out: outputs.update({number: out})

    hooks = [block.register_forward_hook(keeping(number)) for number, block in enumerate(model.blocks)]
    try:
        return model(**given), outputs
    finally:
        for hook in hooks:
            hook.remove()


def _block_output(model: Denoiser, outputs: Mapping[int, Any], place: str) -> Tensor:
    """The output of block "N", or of block "STAGE_N_vis" or "STAGE_N_txt" where blocks are counted by stage."""
    first, *rest = place.split("_")
    if not rest:
        return outputs[int(first)]
    before = sum(stage.blocks for stage in model.stages[: int(first)])
    return outputs[before + int(rest[0])][("vis", "txt").index(rest[1])]
