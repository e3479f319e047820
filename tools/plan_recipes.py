"""Devices, memory and time of each published recipe: `osp plan` for all of them, as the table of docs/recipes.md.

    python tools/plan_recipes.py [EXPERIMENT ...] [--device h100] [--write]

`--write` puts the table into the page; without it, it is printed. A recipe that does not fit is planned with the first
of the settings that `osp plan` advises with which it does.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from check_plan import composed
from osp.cli.plan import asked_of
from osp.devices.datasheets import find_device
from osp.files import write_whole
from osp.report.tables import markdown_table
from osp.training.memory.advice import advise
from osp.training.memory.plan import plan_training
from osp.training.memory.report import available
from osp.training.memory.speed import estimate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- tools/plan_recipes.py -->\n", "<!-- end -->\n"
HEADS = ("experiment", "devices", "as it is, GiB", "settings with which it fits", "GiB", "step, s", "days", "GPU hours")
MFU = 0.4
_GIB = 2**30


@dataclass(frozen=True)
class Recipe:
    """An experiment, the devices that it is planned for, and settings that these need."""

    experiment: str
    devices: int
    settings: tuple[str, ...] = ()


RECIPES = (
    # Published are 32 devices for v1.0, 80 and 512 for v1.1, and 32, 32, 128, 256, 256 for v1.2, whose last stages and
    # v1.1's have no clip for each of them.
    *(Recipe(f"v10_stage{stage}", 32, ("trainer=ddp",)) for stage in (1, 2, 3)),
    Recipe("v11_stage1", 80, ("trainer=ddp",)),
    Recipe("v11_stage2", 64, ("trainer=ddp",)),
    *(Recipe(f"v12_stage{stage}", 32) for stage in (1, 2)),
    *(Recipe(f"v12_{name}", 128) for name in ("stage3", "stage4", "stage5", "93x480", "i2v")),
    *(Recipe(f"v13_stage{stage}", 32) for stage in (1, 2, 3)),
    *(Recipe(f"v13_inpaint_{name}", 32) for name in (*(f"step{step}" for step in range(1, 8)), "stage2")),
    # 512 devices are published for the first; of a batch of 8096 they would not have equal parts.
    Recipe("v15_image1", 512, ("global_batch=8192",)),
    *(Recipe(f"v15_image{stage}", 512) for stage in (2, 3, 4)),
    *(Recipe(f"v15_video{stage}", 512) for stage in (1, 2, 3, 4, 5)),
    *(Recipe(f"wfvae_{name}", 8, ("trainer=ddp",)) for name in ("v13_4ch", "v13_8ch", "large_16ch", "v15_32ch")),
    *(Recipe(f"causalvae_{name}", 8, ("trainer=ddp",)) for name in ("v10", "v11_stage1", "v11_stage2", "v11_stage3")),
    *(Recipe(f"odvae_v12_stage{stage}", 8, ("trainer=ddp",)) for stage in (1, 2)),  # published: 8 devices
)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="these only")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--write", action="store_true", help="write the table into docs/recipes.md")
    arguments = parser.parse_args()
    chosen = [one for one in RECIPES if one.experiment in (arguments.experiments or [one.experiment])]
    table = "".join(f"{line}\n" for line in markdown_table(list(HEADS), list(rows(chosen, arguments.device)), 1))
    if not arguments.write:
        print(table, end="")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_whole(PAGE, before + BEGIN + table + END + after)


def rows(recipes: Sequence[Recipe], device: str) -> Iterator[list[str]]:
    """A row of the table for each recipe."""
    for recipe in recipes:
        yield row(recipe, device)
        print(recipe.experiment, file=sys.stderr, flush=True)


def row(recipe: Recipe, device: str) -> list[str]:
    """The cells of a recipe, as in HEADS."""
    sheet = find_device(device)
    overrides = [f"experiment={recipe.experiment}", f"devices={recipe.devices}", f"device={device}", *recipe.settings]
    asked = asked_of(composed("plan", overrides))
    made, room = plan_training(asked), available(sheet)
    advice = [] if made.peak <= room else advise(asked, room)
    settings, chosen = recipe.settings, made
    if advice:
        settings, chosen = (*settings, *advice[-1].settings), advice[-1].plan
    time = estimate(chosen, sheet, MFU)
    said = " ".join(f"`{setting}`" for setting in settings) if chosen.peak <= room else "none"
    return [
        f"`{recipe.experiment}`",
        f"{recipe.devices}",
        f"{made.peak / _GIB:.1f}",
        said,
        f"{chosen.peak / _GIB:.1f}",
        f"{time.step:.3g}",
        f"{time.run / 86400:.1f}",
        f"{recipe.devices * time.run / 3600:,.0f}",
    ]


if __name__ == "__main__":
    main()
