"""The description of a model family: its class, how the published code writes it, and its published models."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from osp.weights.keys import KeyPair


@dataclass(frozen=True)
class Layout:
    """How the published code writes a model of ours.

    `class_name` is that of the published class; `key_pairs` names the model's tensors there; `settings` are its
    published settings. `further` gives entries of its configuration that do not shape it, for models of which no
    published one is known. `ignored` gives keys, with their shapes, that a checkpoint may hold and no output depends
    on: they are not read, nor written. Nor are keys that begin with one of `dropped`, whatever their shapes.
    `absent` gives published keys that a checkpoint may lack: these are zeros then.
    """

    class_name: Callable[[Any], str]
    key_pairs: Callable[[Any], Iterable[KeyPair]]
    settings: Callable[[Any], dict[str, Any]]
    ignored: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda _: {}
    further: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    dropped: tuple[str, ...] = ()
    absent: Callable[[Any], Collection[str]] = lambda _: ()


@dataclass(frozen=True)
class Kind:
    """A published model.

    `build` makes our model, without weights, for published settings and the weights they came with. `defaults` are the
    settings where a configuration is silent, `full_sizes` what the full-size models have beyond them. `layout` is the
    kind's own where its keys or settings are not those of its family (None).
    """

    build: Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]
    defaults: Mapping[str, Any]
    full_sizes: tuple[Mapping[str, Any], ...]
    layout: Layout | None = None


@dataclass(frozen=True)
class Family:
    """A model family: its name, our class, the layout, and the published kinds of it by name.

    The layout is that of the kinds that have none of their own, and of models whose kind is not given. Saved models and
    checkpoints name the class; `former_names` are names that it had there before.
    """

    name: str
    model: type[nn.Module]
    layout: Layout
    kinds: Mapping[str, Kind]
    former_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that the family goes by, the class's name first."""
        return self.model.__name__, self.name, *self.former_names

    def layout_of(self, kind: Kind) -> Layout:
        """How the published code writes a model of this kind."""
        return kind.layout or self.layout
