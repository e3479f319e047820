"""Single bits that are flipped in what we store: each must be found, or change nothing of what is read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from osp.audit.fuzz import models, stored
from osp.audit.fuzz.cases import Originals, Outcome
from osp.audit.fuzz.changes import flip_bit
from osp.audit.fuzz.subject import Subject, fresh_copy, told_of
from osp.errors import OspError

_STORED = {subject.name: subject for subject in (*stored.TARS, *models.SUBJECTS)}


def _files(name: str, *patterns: str) -> Subject:
    return replace(_STORED[name], changed=patterns)


TARGETS: Mapping[str, Subject] = {
    "shards": _files("rendered", "*.tar"),
    "listings": _files("rendered", "*.jsonl"),
    "index": _files("rendered", "index.json"),
    "features": _files("features", "*.tar", "empty.safetensors"),
    "feature listings": _files("features", "*.jsonl"),
    "feature index": _files("features", "index.json"),
    "weights": _files("pretrained-vae", "*.safetensors"),
    "settings of weights": _files("pretrained-vae", "*.json"),
    "VAE checkpoint": _files("vae", "checkpoints/*.ckpt"),
    "denoiser checkpoint": _files("denoiser", "checkpoints/*.ckpt"),
}


class Flips:
    """Bit flips in the files of one of TARGETS, by seed and number.

    Args:
        folder: where the files lie; made.
        target: a name of TARGETS.
        told: as for `Originals`.
    """

    def __init__(self, folder: Path, target: str, told: Callable[[BaseException], OspError | None] = told_of) -> None:
        self.target, self.subject = target, TARGETS[target]
        self.originals = Originals(folder, [self.subject], told)
        self.originals.make()

    def run(self, seed: int, number: int) -> Outcome:
        """The outcome of a flip; "different" is a silent one."""
        draw = Random(f"{seed}/{self.target}/{number}")
        originals = self.originals
        place = fresh_copy(originals.folder / "originals" / self.subject.name, originals.work)
        path = draw.choice(self.subject.files(place))
        path.write_bytes(flip_bit(draw, path.read_bytes()))
        return originals.judged(self.subject, place, str(path.relative_to(place)))
