"""Does sparse attention match dense attention here? One study in small, all variants on the same cached features:

    python tools/study.py features=DIR heldout_features=DIR heldout=SHARDS output=DIR [--seeds 3] [--steps N] [--jobs 4]

`denoiser=NAME` of conf/denoiser is changed in its stages alone; `--variants` takes any registered pattern too, as
PATTERN or PATTERN_kN, and `--imports` modules that register some. What is trained, judged and written is said in
`osp.benchmark.study`. The same command goes on with what is missing.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from osp.benchmark.study import Study, run_study
from osp.benchmark.study_results import FILES, markdown
from osp.benchmark.study_runs import DENOISER, EXPERIMENT, NAMES
from osp.checks import check_choice, check_number
from osp.cli import config_folder, user_error
from osp.extensions import import_modules

FOLDERS = ("features", "heldout_features", "heldout", "output")
NUMBERS = ("seeds", "steps", "jobs", "threads", "prompts", "rounds")


def main() -> None:
    """Train and judge what is missing, time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="KEY=FOLDER", help=f"{', '.join(FOLDERS)}, denoiser")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, help=f"of each run; default: those of {EXPERIMENT}")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run, and of the timing")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each variant")
    names = f"separated by commas; patterns, or of {', '.join(NAMES)}; default: all of these that the denoiser has"
    parser.add_argument("--variants", help=names)
    parser.add_argument("--imports", default="", help="modules of your own, separated by commas")
    args = parser.parse_intermixed_args()
    given = dict(folder.partition("=")[::2] for folder in args.folders)
    denoiser = given.pop("denoiser", DENOISER)
    if set(given) != set(FOLDERS) or not all(given.values()):
        parser.error("give features=DIR heldout_features=DIR heldout=SHARDS output=DIR, and perhaps denoiser=NAME")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        check_choice("denoiser", denoiser, denoisers())
        import_modules([name for name in args.imports.split(",") if name])
        numbers = {name: getattr(args, name) for name in NUMBERS}
        for name, value in numbers.items():
            check_number(f"--{name}", value, 1, whole=True, null="the experiment's" if name == "steps" else "")
        features, heldout_features, heldout, output = (Path(given[name]).resolve() for name in FOLDERS)
        folders = (features, heldout_features, heldout, output)
        chosen = args.variants.split(",") if args.variants else None
        how = {"denoiser": denoiser, "variants": chosen, **numbers}
        results = run_study(Study(*folders, composed, instantiate, **how))
    except Exception as error:
        if (told := user_error(error, "train")) is None:
            raise
        parser.exit(told.exit_code, f"study: {told}\n")
    print(markdown(results))
    files = {name: str(output / name) for name in FILES}
    print(json.dumps({"output": str(output), "files": files, "rows": results["rows"]}), flush=True)


def denoisers() -> list[str]:
    """The configurations of denoisers that have stages to change."""
    names = sorted(path.stem for path in (config_folder() / "denoiser").glob("*.yaml"))
    return [name for name in names if name not in ("pretrained", "published")]


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of `osp train` with these overrides, as plain values."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        settings = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


if __name__ == "__main__":
    main()
