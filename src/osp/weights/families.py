"""The registry of model families: the one place that knows which there are."""

from typing import Any, TypeVar

from torch import nn

from osp.checks import check_choice
from osp.denoiser import Denoiser
from osp.errors import OspError, UsageError
from osp.extensions import import_named
from osp.vae import VideoVAE
from osp.weights import causalvae, cross, joint, latte, wfvae
from osp.weights.layout import Family, Kind

Model = TypeVar("Model", bound=nn.Module)

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family. Raises UsageError for a name that is taken, and for a piece that is missing."""
    model = family.model
    taken = {name for other in FAMILIES.values() for name in (*other.names, *other.kinds)}
    if twice := [name for name in (*family.names, *family.kinds) if name in taken]:
        raise UsageError(f"family {family.name}: there is another {', '.join(twice)}")
    if not issubclass(model, Denoiser | VideoVAE):
        raise UsageError(f"family {family.name}: {model.__name__} is neither a Denoiser nor a VideoVAE")
    missing = [name for name in dir(model) if getattr(getattr(model, name, None), "__isabstractmethod__", False)]
    if issubclass(model, Denoiser) and not hasattr(model, "linear_layers"):
        missing.append("linear_layers")  # by which its operations are counted
    if missing:
        raise UsageError(f"family {family.name}: {model.__name__} lacks {', '.join(missing)}")
    if not family.kinds:
        raise UsageError(f"family {family.name}: has no kinds, by which published weights are read")
    FAMILIES[family.name] = family


def find_kind(name: str) -> tuple[Family, Kind]:
    """A published kind and its family. Raises UsageError for a name that no family has."""
    if not any(name in family.kinds for family in FAMILIES.values()):
        import_named()
    check_choice("kind", name, [kind for family in FAMILIES.values() for kind in family.kinds])
    return next((family, family.kinds[name]) for family in FAMILIES.values() if name in family.kinds)


def family_of(model: nn.Module) -> Family | None:
    """The family of a model; None if it has none."""
    own = (family for family in FAMILIES.values() if type(model) is family.model)
    derived = (family for family in FAMILIES.values() if isinstance(model, family.model))
    return next(own, None) or next(derived, None)


def find_class(name: Any, base: type[Model], key: str = "model", error: type[OspError] = UsageError) -> type[Model]:
    """The class below `base` that a saved model or checkpoint names, by its name, its family's or a former one.

    Raises an `error` about `key` for any other name.
    """
    if not any(name in family.names for family in FAMILIES.values()):
        import_named()
    families = [family for family in FAMILIES.values() if issubclass(family.model, base)]
    if not isinstance(name, str) or not any(name in family.names for family in families):
        check_choice(key, name, [family.model.__name__ for family in families], error)
    return next(family.model for family in families if name in family.names)  # type: ignore[return-value]


for _family in (wfvae.FAMILY, causalvae.FAMILY, latte.FAMILY, cross.FAMILY, joint.FAMILY):
    register(_family)
