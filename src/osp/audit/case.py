"""One recorded case: what it holds, and how far we are from it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from osp.errors import DataError, UsageError


class Unsupported(UsageError):
    """A case of a known kind whose settings we do not build."""


class Unknown(UsageError):
    """A case that is of no kind we know."""


class Comparison(NamedTuple):
    """How far one result is from the recorded one: the largest difference of any value, and how large it may be.

    `documented` says why they differ, where what is recorded is a fault of the published code that we do not repeat.
    """

    what: str
    difference: float
    bar: float
    documented: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bar; not a number is not."""
        return self.difference <= self.bar

    @property
    def share(self) -> float:
        """The difference as a share of the bar, by which the worst of several is found."""
        if math.isnan(self.difference):
            return math.inf
        return self.difference / self.bar if self.bar else math.inf * self.difference if self.difference else 0.0


@dataclass(frozen=True)
class Case:
    """`FOLDER/KIND/NAME.json` with the settings and `NAME.safetensors` with weights, inputs and outputs.

    It is run on `device`, to which all that is recorded is brought.
    """

    kind: str
    name: str
    folder: Path
    device: str = "cpu"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The object in the case's JSON file. Raises DataError if the file is missing or holds no object."""
        path = self.folder / f"{self.name}.json"
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        if not isinstance(settings, dict):
            raise DataError(f"{path}: holds no object")
        return settings

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All that is recorded, as float32 where it is of floating point. Raises DataError if it cannot be read."""
        path = self.folder / f"{self.name}.safetensors"
        try:
            stored = {key: value.to(self.device) for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        return {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}

    def tensor(self, key: str) -> Tensor:
        """One of them. Raises DataError naming one that is missing."""
        if key not in self.tensors:
            raise DataError(f"{self.folder / self.name}.safetensors: has no {key}")
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, by the rest of their keys."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def setting(self, *keys: str) -> Any:
        """An entry of the JSON file, in others. Raises DataError naming it if it is missing."""
        value: Any = self.settings
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise DataError(f"{self.folder / self.name}.json: has no {'.'.join(keys)}")
            value = value[key]
        return value

    def bar(self, *names: str, least: float = 1e-5) -> float:
        """How far a result may be off: four times what float32 costs the published code there, and `least`.

        `names` are entries of the recorded tolerances, of which the first counts that is there; there may be one
        tolerance for all. Raises DataError if none is recorded.
        """
        recorded = self.setting("tolerance_f32_vs_f64")
        if isinstance(recorded, Mapping):
            recorded = next((recorded[name] for name in names if name in recorded), None)
        if not isinstance(recorded, int | float) or not 0 <= recorded < math.inf:
            raise DataError(f"{self.folder / self.name}.json: records no tolerance of {names[0]}")
        return 4 * recorded + least

    def compare(self, what: str, got: Tensor, bar: float, relative: float = 0.0) -> Comparison:
        """A result against the recorded `out/WHAT`. Raises DataError if that is missing or has another shape.

        Where values are large, `relative` allows for a share of each besides the bar.
        """
        return difference(what, got, self.tensor(f"out/{what}"), bar, relative)


def difference(what: str, got: Tensor, recorded: Tensor, bar: float, relative: float = 0.0) -> Comparison:
    """The largest difference of two tensors. Raises DataError if they differ in shape or nothing is in them."""
    if got.shape != recorded.shape or not recorded.numel():
        raise DataError(f"{what} is of shape {tuple(got.shape)}, where {tuple(recorded.shape)} is recorded")
    got, recorded = got.cpu(), recorded.cpu()  # where there surely is float64
    off = (got.double() - recorded.double()).abs()
    off = off.where(got != recorded, 0.0)  # equal infinities
    if relative:
        off = off / (1 + relative / bar * recorded.double().abs())
    return Comparison(what, off.max().item(), bar)
