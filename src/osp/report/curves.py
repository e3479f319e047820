"""The curves of a training run, read from its TensorBoard log."""

import logging
from pathlib import Path


def read_curves(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of everything that the run in a folder logged as a number, by its name; empty without a log."""
    folder = run_folder / "tensorboard"
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes its time to load

    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells where it stops reading
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
