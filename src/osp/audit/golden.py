"""Every recorded case below a folder, run: what passes, what fails and why, and what nobody here knows."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from osp.audit.case import Case, Comparison, Unknown, Unsupported
from osp.audit.latte import run_latte
from osp.audit.losses import run_causalvae_loss
from osp.audit.masks import run_mask_v12
from osp.audit.networks import run_denoiser, run_manifest, run_vae, run_wavelet
from osp.audit.older_schedules import run_older
from osp.audit.schedules import run_v13, run_v15
from osp.audit.texts import run_cleaning
from osp.denoiser import Denoiser
from osp.errors import DataError
from osp.weights.families import FAMILIES

Runner = Callable[[Case], Iterator[Comparison]]
State = Literal["passed", "failed", "documented", "not supported", "unknown"]
STATES: tuple[State, ...] = get_args(State)

_OF_FAMILY: dict[str, Runner] = {"latte": run_latte}  # whose cases hold more than those of other denoisers
MANIFESTS, _MANIFEST = "manifests", ".json.gz"
_CASE = (".json", ".safetensors")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case, or of all cases of an unknown kind; `detail` is the figures, or the reason."""

    state: State
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<14} {self.name}: {self.detail}"


def runners() -> dict[str, Runner]:
    """How a case of each kind is run: every kind of the registry's families, wavelets, schedules, losses and texts."""
    found: dict[str, Runner] = {"wavelet": run_wavelet, "sched_v13": run_v13, "sched_v15": run_v15}
    found |= {"sched_v10": run_older, "sched_v12": run_older, "mask_v12": run_mask_v12}
    found |= {"causalvae_loss": run_causalvae_loss, "text_clean": run_cleaning}
    for family in FAMILIES.values():
        usual = run_denoiser if issubclass(family.model, Denoiser) else run_vae
        found |= dict.fromkeys(family.kinds, _OF_FAMILY.get(family.name, usual))
    return found


def find_cases(folder: Path, kind: str) -> list[Case]:
    """The cases of a kind anywhere below a folder, with those of which a file is missing."""
    paths = sorted({path.with_suffix("") for path in _files(folder) if path.suffix in _CASE})
    return [Case(kind, path.name, path.parent) for path in paths if path.parent.name == kind]


@torch.no_grad()
def compare(case: Case) -> list[Comparison]:
    """Our results compared with all that is recorded of a case.

    Raises Unsupported for settings that we do not build, DataError for a damaged case, and whatever running it raises.
    """
    return list(runners()[case.kind](case))


def check(folder: Path, device: str = "cpu") -> Iterator[Outcome]:
    """An outcome for each case of a known kind below a folder, for each manifest, and for each unknown kind."""
    root, files, known = folder.resolve(), list(_files(folder)), runners()
    paths = sorted({path.with_suffix("") for path in files if path.suffix in _CASE})
    for path in paths:
        if path.parent.name in known:
            case = Case(path.parent.name, path.name, path.parent, device)
            yield from _outcomes(_label(path.parent, root, path.name), partial(compare, case))
    for path in files:
        if path.name.endswith(_MANIFEST) and path.parent.name == MANIFESTS:
            yield from _outcomes(_label(path.parent, root, path.name.removesuffix(_MANIFEST)), partial(_manifest, path))
    unknown = Counter(path.parent for path in paths if path.parent.name not in known)
    for other, cases in unknown.items():
        yield Outcome("unknown", _label(other, root), f"no such kind is known here (cases: {cases})")


def summary(outcomes: Iterable[Outcome]) -> str:
    """How many outcomes there are of each state, in one line."""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES)


def _label(folder: Path, root: Path, name: str = "") -> str:
    """Where a case lies below the folder that is looked through, which may be that of a kind itself."""
    return str((folder.relative_to(root) if folder != root else Path(root.name)) / name)


def _manifest(path: Path) -> list[Comparison]:
    return [run_manifest(path)]


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    # The path is resolved, since the folder's own name may be that of a kind.
    return (path for path in sorted(folder.resolve().rglob("*")) if path.is_file())


def _outcomes(name: str, run: Callable[[], list[Comparison]]) -> Iterator[Outcome]:
    """The outcome of a case, and one more for each set of inputs that differs for a documented reason."""
    try:
        comparisons = run()
    except Unsupported as error:
        yield Outcome("not supported", name, str(error))
    except Unknown as error:
        yield Outcome("unknown", name, str(error))
    except Exception as error:  # noqa: BLE001  one broken case must not hide the others
        reason = " ".join(str(error).split()) or "no reason given"
        yield Outcome("failed", name, reason if isinstance(error, DataError) else f"{type(error).__name__}: {reason}")
    else:
        yield _judged(name, [one for one in comparisons if not one.documented])
        for one in comparisons:
            if one.documented:
                detail = f"{one.what} differs as documented ({one.difference:.2g}): {one.documented}"
                yield Outcome("documented", name, detail)


def _judged(name: str, comparisons: list[Comparison]) -> Outcome:
    if not comparisons:
        return Outcome("failed", name, "nothing is recorded")
    worst = max(comparisons, key=lambda one: one.share)
    others = f", worst of {len(comparisons)}" if len(comparisons) > 1 else ""
    detail = f"difference {worst.difference:.2g}, bar {worst.bar:.2g} ({worst.what}{others})"
    return Outcome("passed" if worst.passed else "failed", name, detail)
