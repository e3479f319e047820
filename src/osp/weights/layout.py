"""The description of a model family: its class, how the published code writes it, and its published models."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from osp.data.media.shape import Shape
from osp.weights.keys import KeyPair

MERGED, TORCH = "merged.ckpt", "diffusion_pytorch_model.pt"
"""The torch files beside the safetensors file of a published folder, where there is one."""


@dataclass(frozen=True)
class Reading:
    """The file that the published class reads, and the Python that does it.

    In `lines`, `{name}` is the class and `{folder}` the folder that `save_published` has written. All folders hold
    `config.json` and a safetensors file; `torch_file` is one beside it for a class that takes no other, whose state
    dict lies under the keys `within`, one in another.
    """

    lines: tuple[str, ...] = ('model = {name}.from_pretrained("{folder}")',)
    torch_file: str | None = None
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How the published code writes a model of ours.

    `class_name` is that of the published class; `key_pairs` names the model's tensors there; `settings` are its
    published settings. `ignored` gives keys, with their shapes, that a checkpoint may hold and no output depends on:
    they are not read, nor written. Nor are keys that begin with one of `dropped`, whatever their shapes. `absent` gives
    published keys that a checkpoint may lack: these are zeros then.

    `held` gives a model with the same output that the class can hold, the model itself if it does, and raises
    UsageError with the nearest that it could hold. `further` are settings of the class that do not shape the model, for
    latents of a size if one is known. `reading` says what the class reads.
    """

    class_name: Callable[[Any], str]
    key_pairs: Callable[[Any], Iterable[KeyPair]]
    settings: Callable[[Any], dict[str, Any]]
    ignored: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda _: {}
    dropped: tuple[str, ...] = ()
    absent: Callable[[Any], Collection[str]] = lambda _: ()
    held: Callable[[Any], nn.Module] = lambda model: model
    further: Callable[[Any, Shape | None], dict[str, Any]] = lambda _model, _size: {}
    reading: Callable[[Any], Reading] = lambda _: Reading()


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

    The layout is that of the kinds that have none of their own. `likely` gives the kind that a model is most like, for
    those whose kind is not known; None: the first. Saved models and checkpoints name the class; `former_names` are
    names that it had there before.
    """

    name: str
    model: type[nn.Module]
    layout: Layout
    kinds: Mapping[str, Kind]
    former_names: tuple[str, ...] = ()
    likely: Callable[[Any], str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All that the family goes by, the class's name first."""
        return self.model.__name__, self.name, *self.former_names

    def layout_of(self, kind: Kind) -> Layout:
        """How the published code writes a model of this kind."""
        return kind.layout or self.layout
