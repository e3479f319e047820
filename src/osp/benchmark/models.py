"""The model that a benchmark measures, as the configuration from which each process builds it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
"""The number format of the arithmetic, by the name of the precision."""


@dataclass(frozen=True)
class ModelSource:
    """A model that is not built yet.

    Args:
        name: that of its configuration.
        config: its class or function (`_target_`) and settings, as JSON.
        build: a model from what `config` says; a function that another process finds by its name.
    """

    name: str
    config: str
    build: Callable[[dict[str, Any]], Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The values in `config`."""
        settings: dict[str, Any] = json.loads(self.config)
        return settings

    @property
    def origin(self) -> str | None:
        """Where the weights come from; None: they are random."""
        settings = self.settings
        return settings.get("path") or settings.get("source")

    def built(self, **changed: Any) -> Any:
        """The model, with these settings changed."""
        return self.build(self.settings | changed)

    def title(self, model: nn.Module) -> str:
        """The model's title: its kind or name, where its weights come from, and its number of parameters."""
        named = f"{self.settings.get('kind', type(model).__name__)} of {self.origin}"
        name = named if self.origin else f"{self.name} with random weights"
        return f"{name}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def weights_dtype(precision: str) -> torch.dtype:
    """The number format that the weights are stored in."""
    return PRECISIONS[precision] if precision.endswith("true") else torch.float32
