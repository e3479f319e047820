"""Everything that videos are made with: each setting's name, unit, limits and meaning, once.

The command line, the record beside a video and the evaluation read `Sampling`.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from osp.checks import check_choice, check_number
from osp.conditioning import MODES
from osp.data.media.shape import Shape
from osp.devices.precision import AUTOCAST
from osp.diffusion import Epsilon, Flow, Objective, Solver, solvers
from osp.errors import OspError, UsageError
from osp.sampling.defaults import GUIDANCE, default_solver
from osp.vae import Tiling

MEMORY = ("normal", "low")
NO_TEMPLATE = "none"
FRAMES = "frames"
"""The mode of frames that are given by their numbers."""


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A field with its meaning and the limits of `osp.checks`: `choices`, or `least`, `most` and `whole`.

    `null` says what None means, where it is allowed.
    """
    return field(default=default, metadata={"meaning": meaning, "limits": limits})


@dataclass(frozen=True)
class ClipSize:
    """Frames, and height and width in pixels."""

    frames: int | None = setting(
        None, "frames of each video; 1 is an image", least=1, whole=True, null="that of the training clips"
    )
    height: int | None = setting(None, "height in pixels", least=1, whole=True, null="that of the training clips")
    width: int | None = setting(None, "width in pixels", least=1, whole=True, null="that of the training clips")

    def filled(self, known: Mapping[str, Any] | None) -> Shape:
        """The size, with the model's own values in place of null. Raises UsageError naming one that is not known."""
        sizes: dict[str, int] = {}
        for key in Shape._fields:
            own = getattr(self, key)
            size = (known or {}).get(key) if own is None else own
            if size is None:
                raise UsageError(f"clip.{key} is not known for this model; give clip.{key}=NUMBER")
            sizes[key] = int(size)
        return Shape(**sizes)


@dataclass(frozen=True)
class SolverSettings:
    """How noise is turned into a video; see `osp.diffusion.Solver`."""

    name: str | None = setting(
        None,
        "the solver, which makes a video of noise; lms, ddpm and ddim need discrete steps, pndm a predicted noise",
        choices=dict.fromkeys([*solvers(Flow()), *solvers(Epsilon())]),
        null="as fits the objective",
    )
    steps: int | None = setting(
        None, "steps of the solver", least=1, whole=True, null="as many as do well for the objective"
    )
    shift: float | None = setting(
        None, "factor that moves the noise levels of a flow towards noise", above=0, null="as in training"
    )
    options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"meaning": "settings of the solver's class in diffusers", "limits": None}
    )

    def build(self, objective: Objective) -> Solver:
        """The solver for an objective; what is null is as in `default_solver`. Raises UsageError if they do not go."""
        usual = default_solver(objective)
        steps = usual.steps if self.steps is None else self.steps
        return Solver(objective, self.name or usual.name, steps, self.shift, dict(self.options or {}))


@dataclass(frozen=True)
class Sampling:
    """All that videos are made with beside prompts, files of given frames and the model.

    Raises UsageError naming the first setting that is out of its limits.
    """

    clip: ClipSize = field(default_factory=ClipSize)
    fps: float | None = setting(None, "frames a second of the files", least=0.001, null="that of the training videos")
    seed: int = setting(0, "seed of the first video; each next one has the next seed", least=0, whole=True)
    videos_per_prompt: int = setting(1, "videos of each prompt, each with a seed of its own", least=1, whole=True)
    batch_size: int = setting(1, "videos that are made at once", least=1, whole=True)
    template: str = setting(
        NO_TEMPLATE, "words around each prompt, which takes the place of {}; none: the prompt alone", template=True
    )
    negative_prompt: str | None = setting(
        None, "what the videos should not show; guidance leads away from it", text=True, null="usual_negative"
    )
    usual_negative: str = setting("", "what guidance leads away from where no negative prompt is given", text=True)
    negative_template: str = setting(
        NO_TEMPLATE, "words around a negative prompt that is given, which takes the place of {}; none", template=True
    )
    guidance: float = setting(GUIDANCE, "how strongly the prompt is followed; 1: without guidance", least=0)
    rescale: float = setting(0.0, "share of the contrast added by guidance that is taken back", least=0, most=1)
    solver: SolverSettings = field(default_factory=SolverSettings)
    mode: str | None = setting(
        None, "what is given beside the prompt", choices=(*MODES, FRAMES), null="as the given files say"
    )
    keep_frames: int = setting(
        5, "frames of the given video that are kept, and that the new ones go on from", least=1, whole=True
    )
    hold_given: bool = setting(
        True,
        "true: given frames that fill whole latent frames are kept; false: the model copies them, as published",
        choices=(True, False),
    )
    precision: str = setting(
        "32-true",
        "precision of the arithmetic; 32-true: the weights' own, auto: what is fast on the device",
        choices=(*AUTOCAST, "auto"),
    )
    memory: str = setting(
        "normal", "low: each part is on the device only while it works, and the denoiser block by block", choices=MEMORY
    )
    tiling: Tiling | None = field(
        default=None,
        metadata={
            "meaning": "tiles that the VAE takes frames in, {size: 256, overlap: 64} in pixels; null: whole frames",
            "limits": None,
        },
    )

    def __post_init__(self) -> None:
        for name, value in _flat(self).items():
            check_setting(name, value)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The settings in plain values by name, `clip` and `solver` as mappings; missing ones are as by default.

        Names that are no setting are passed over, so that a whole configuration may be given, also those of `clip` (of
        an evaluation it says how clips are read too). Raises UsageError for one of `solver` or `tiling`.
        """
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        if "clip" in known:
            known["clip"] = ClipSize(**{key: known["clip"][key] for key in Shape._fields if key in known["clip"]})
        if "solver" in known:
            for key in known["solver"]:
                check_choice("solver: key", key, [one.name for one in fields(SolverSettings)])
            known["solver"] = SolverSettings(**known["solver"])
        if "tiling" in known:
            known["tiling"] = Tiling.read(known["tiling"])
        return cls(**known)

    def worded(self, prompt: str) -> str:
        """A prompt within the template."""
        return _within(self.template, prompt)

    def negative(self, given: str | None = None) -> str:
        """The text that guidance leads away from: the one that is given, or else the setting, within its template.

        Where neither is there it is the usual one, as it is; an empty one stays empty.
        """
        given = self.negative_prompt if given is None else given
        if given is None:
            return self.usual_negative
        return _within(self.negative_template, given) if given.strip() else given

    def guiding(self, objective: Objective) -> dict[str, Any]:
        """`solver`, `guidance` and `rescale`, as a generator with this objective takes them."""
        return {"solver": self.solver.build(objective), "guidance": self.guidance, "rescale": self.rescale}


def setting_meanings() -> dict[str, str]:
    """The meaning of each setting by its whole name, with its limits and the meaning of null."""
    return {name: _meaning(one.metadata) for name, one in _FIELDS.items() if "meaning" in one.metadata}


def _meaning(metadata: Mapping[str, Any]) -> str:
    limits = metadata["limits"] or {}
    choices = limits.get("choices", ())
    parts = [
        metadata["meaning"],
        "" if True in choices else ", ".join(choices),
        "{least} to {most}".format(**limits) if "most" in limits else "",
        f"null: {limits['null']}" if limits.get("null") else "",
    ]
    return "; ".join(part for part in parts if part)


def check_setting(name: str, value: Any, key: str | None = None, error: type[OspError] = UsageError) -> None:
    """Raise an error unless a setting may have this value; `name` is that of Sampling, such as `clip.frames`.

    `key` is what the message calls it, if that is another name.
    """
    limits = _FIELDS[name].metadata["limits"]
    if limits is None or (value is None and limits.get("null")):
        return
    shown = name if key is None else key
    if "choices" in limits:
        check_choice(shown, value, limits["choices"], error)
    elif "text" in limits or "template" in limits:
        if not isinstance(value, str):
            raise error(f"{shown}={'null' if value is None else value}: must be text")
        if "template" in limits and value != NO_TEMPLATE and "{}" not in value:
            raise error(f"{shown}={value}: has no {{}} for the prompt; give words with {{}} among them, or none")
    else:
        check_number(shown, value, **limits, error=error)


def _within(template: str, prompt: str) -> str:
    return prompt if template == NO_TEMPLATE else template.replace("{}", prompt)


def _flat(part: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for one in fields(part):
        value = getattr(part, one.name)
        parts = isinstance(value, ClipSize | SolverSettings)
        inner = {f"{one.name}.{key}": each for key, each in _flat(value).items()} if parts else None
        flat |= {one.name: value} if inner is None else inner
    return flat


def _fields() -> dict[str, Field[Any]]:
    """Each setting by its whole name."""
    named: dict[str, Field[Any]] = {one.name: one for one in fields(Sampling)}
    for part, kind in (("clip", ClipSize), ("solver", SolverSettings)):
        named |= {f"{part}.{one.name}": one for one in fields(kind)}
    return named


_FIELDS = _fields()
