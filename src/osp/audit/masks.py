"""Frame masks on the grid of the latent against recorded cases."""

from collections.abc import Iterator

from osp.audit.case import Case, Comparison
from osp.conditioning.frames import latent_mask, spread
from osp.conditioning.masks import keep


def run_mask_v12(case: Case) -> Iterator[Comparison]:
    """The mask's channels of v1.2's image-to-video model, for the frames that are kept."""
    frames, height, width = (case.setting("config", key) for key in ("frames", "height", "width"))
    time, *space = case.setting("config", "strides")
    mask, bar = case.tensor("in/frame_mask")[None], case.bar("mask")
    size = height // space[0], width // space[-1]
    yield case.compare("mask", latent_mask(spread(mask, height, width), time, *size, "v12"), bar)
    kept = case.settings["config"].get("kept")
    if kept is not None:
        made = keep(frames, kept)[None].to(mask.device)
        found = latent_mask(spread(made, height, width), time, *size, "v12")
        yield case.compare("mask", found, bar)._replace(what="mask of the kept frames")
