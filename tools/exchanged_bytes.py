"""Bytes that devices exchange where they share a clip's tokens, by pattern, and the time of a step of two processes.

    python tools/exchanged_bytes.py                 # v1.3 and v1.5 at full size, by arithmetic
    python tools/exchanged_bytes.py --counted       # small models in two processes: bytes as sent, beside the formula
    python tools/exchanged_bytes.py --seconds 3     # time of a training step, dense against Skiparse (A-B-B-A)

A table for docs/performance.md. Bytes are those of one forward pass, sent by each device on average.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage
from osp.parallel.launch import on_devices
from osp.parallel.sequence import split_sequence
from osp.parallel.sequence_bytes import exchanged_bytes
from osp.report.tables import markdown_table

FULL = {
    "v1.3, 93x720x1280": (CrossTransformer, (24, 90, 160)),
    "v1.5, 121x576x1024": (JointTransformer, (16, 72, 128)),
}
SMALL: dict[str, Any] = {"heads": 8, "text_channels": 64, "channels": 8, "out_channels": 8}
SMALL_LATENT, SMALL_TEXT = (8, 32, 32), 64
USES = ("tokens", "heads", "text", "prediction")
_MIB = 2**20


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help="send the bytes of small models in two processes")
    parser.add_argument("--seconds", type=int, default=0, metavar="STEPS", help="time so many training steps each")
    arguments = parser.parse_args()
    if arguments.counted:
        print_counted()
    elif arguments.seconds:
        print_seconds(arguments.seconds)
    else:
        print_full()


def print_full() -> None:
    """The published shapes in bfloat16, sparse and dense, on 2, 4 and 8 devices."""
    rows = []
    for name, (kind, latent) in FULL.items():
        with torch.device("meta"):
            sparse = kind().bfloat16()
            dense = kind(stages=[Stage(stage.blocks) for stage in sparse.stages]).bfloat16()
        for ranks in (2, 4, 8):
            totals = []
            for schedule, model in (("Skiparse", sparse), ("dense", dense)):
                sent, grid = exchanged_bytes(model, latent, 512, ranks)
                totals.append(sent.total())
                each = [f"{sent[use] / ranks / _MIB:,.0f}" for use in USES]
                rows.append([name, f"{grid.tokens:,}", ranks, schedule, *each, f"{sent.total() / ranks / _MIB:,.0f}"])
            rows[-2].append(f"{totals[0] / totals[1]:.2f}")
            rows[-1].append("1.00")
    heads = ["denoiser", "tokens", "devices", "schedule", *(f"{use}, MiB" for use in USES), "all, MiB", "to dense"]
    print(table(heads, rows))


def small(family: str, is_sparse: bool) -> Denoiser:
    """A small model of six blocks of one schedule."""
    pattern = {"pattern": "skiparse", "k": 4} if is_sparse else {}
    stages = [{"blocks": 6, **pattern}]
    if family == "v1.5":
        joint = {"head_dim": 32, "pooled_channels": 16, "modulation_width": 64, "long_skips": False}
        return JointTransformer(stages=stages, **SMALL, **joint)
    return CrossTransformer(stages=stages, head_dim=24, **SMALL)


def print_counted() -> None:
    """Bytes as two processes send them over gloo, beside those of the formula, in float32."""
    rows = []
    for family in ("v1.3", "v1.5"):
        for is_sparse in (True, False):
            sent = on_devices(2, torch.device("cpu"), sent_by_all, family, is_sparse)
            with torch.device("meta"):
                formula, _ = exchanged_bytes(small(family, is_sparse), SMALL_LATENT, SMALL_TEXT, 2)
            for use in [use for use in USES if sent[use] or formula[use]]:
                rows.append([family, "Skiparse" if is_sparse else "dense", use, f"{sent[use]:,}", f"{formula[use]:,}"])
    print(table(["like", "schedule", "use", "bytes sent", "by the formula"], rows))


def sent_by_all(device: torch.device, family: str, is_sparse: bool) -> Counter[str]:
    """The bytes that all processes have sent in one forward pass."""
    model = small(family, is_sparse)
    over = split_sequence(model)
    with torch.no_grad():
        model(**inputs(model))
    own = torch.tensor([over.sent[use] for use in USES])
    return Counter(dict(zip(USES, over.summed(own, "count").tolist(), strict=True)))


def print_seconds(steps: int) -> None:
    """Seconds of a forward and backward pass of two processes: dense, sparse, sparse, dense in one run."""
    rows = []
    for family in ("v1.3", "v1.5"):
        taken = on_devices(2, torch.device("cpu"), timed, family, steps)
        dense, sparse = (taken[0] + taken[3]) / 2, (taken[1] + taken[2]) / 2
        rows.append([family, *(f"{seconds:.3f}" for seconds in taken), f"{sparse / dense:.2f}"])
    print(f"latent {SMALL_LATENT}, batch 1, six blocks, float32, cpu: two processes over gloo, a thread each")
    print(table(["like", "dense, s", "Skiparse, s", "Skiparse, s", "dense, s", "Skiparse to dense"], rows))


def timed(device: torch.device, family: str, steps: int) -> list[float]:
    """The fastest step of each of four rounds, after one step that is not counted."""
    torch.set_num_threads(1)
    models = [small(family, is_sparse) for is_sparse in (False, True)]
    for model in models:
        split_sequence(model)
        model(**inputs(model)).sum().backward()
    return [min(step(models[number]) for _ in range(steps)) for number in (0, 1, 1, 0)]


def step(model: Denoiser) -> float:
    """Seconds of a forward and backward pass."""
    begun = time.monotonic()
    model(**inputs(model)).sum().backward()
    return time.monotonic() - begun


def inputs(model: Denoiser) -> dict[str, torch.Tensor]:
    """The same inputs in each process."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "latent": torch.randn(1, model.latent_channels, *SMALL_LATENT, generator=generator),
        "time": torch.full((1,), 500.0),
        "text": torch.randn(1, SMALL_TEXT, model.text_channels, generator=generator),
    }
    if model.pooled_channels is not None:
        made["pooled_text"] = torch.randn(1, model.pooled_channels, generator=generator)
    return made


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(markdown_table(heads, [[str(value) for value in row] for row in rows]))


if __name__ == "__main__":
    main()
