"""Run every recorded case of the published code's numbers below a folder: `python tools/check_golden.py FOLDER`.

`--device cuda` runs them there, in full float32.

Cases lie as `KIND/NAME.json` and `KIND/NAME.safetensors`, key lists of full-size checkpoints as
`manifests/NAME.json.gz`. One line each: whether it passed, with the difference that is the largest share of its bar. A
set of inputs that shows a fault of the published code, which docs/weights.md says that we do not repeat, has a further
line, `documented`, with its difference; its case passes only if what is recorded comes out with the fault. A kind that
is unknown, and settings that we do not build, have a line too. All these are neither passed nor failed. Exits with 1 if
a case failed, also one that cannot be read, or if there is no case at all.
"""

import argparse
import sys
from pathlib import Path

import torch

from osp.audit.golden import Outcome, check, summary
from osp.devices import choose_device
from osp.errors import OspError


def main() -> int:
    """Print the lines; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    try:
        device = choose_device(arguments.device)
        torch.backends.cudnn.allow_tf32 = False  # torch lets convolutions round to 10 bits
        for outcome in check(arguments.folder, str(device)):
            outcomes.append(outcome)
            print(outcome, flush=True)
    except OspError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not outcomes:
        print("there is no case below this folder", file=sys.stderr)
        return 1
    print(summary(outcomes))
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
