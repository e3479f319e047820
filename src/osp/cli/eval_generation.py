"""`osp eval target=generation`: whether generated videos show what their prompts say."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.cli.checks import check_generator_source, check_numbers
from osp.cli.eval_input import counted, model_name, read_clips
from osp.cli.plain import instantiate, plain
from osp.cli.settings import read_sampling
from osp.devices import choose_device, choose_precision
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import video_features
from osp.evaluation.generation import evaluate_generation
from osp.sampling.judging import RealClips, ToJudge, videos_to_make, videos_to_read

_MAKING = {"prompts", "seed", "guidance", "rescale", "solver", "generator"}
_MAKING |= {"template", "negative_prompt", "usual_negative", "negative_template", "mode", "keep_frames", "hold_given"}


def generation(cfg: DictConfig) -> dict[str, Any]:
    """Generate and judge as configured; gives the rates, the distances and where the results lie.

    Raises UsageError or DataError before any compute for settings that do not fit, clips without captions, and prompts
    that cannot be judged.
    """
    least = {"prompts": 1, "contact_sheet_clips": 0, "save_videos": 0, "clip.stride": 1}
    check_numbers(cfg, least, optional=["save_videos"])
    precision = choose_precision(cfg.precision, device := choose_device(cfg.device))
    features = video_features("random3d" if cfg.features.path is None else "i3d", cfg.features.path)
    videos = _to_judge(cfg)
    videos.check_prompts()
    output = HydraConfig.get().runtime.output_dir
    results = evaluate_generation(
        counted(videos.clips, len(videos.prompts)),
        read_clips(videos.real, len(videos.real)),
        output=output,
        model_name=videos.name,
        features=features,
        vae=videos.vae,
        given=videos.given,
        device=device,
        precision=precision,
        contact_sheet_clips=cfg.contact_sheet_clips,
        save_videos=cfg.save_videos,
        settings=_settings(cfg, videos),
    )
    keys = ("model", "counts", "accuracy", "frechet", "given")
    return {"output": output, **{key: results[key] for key in keys}}


def _to_judge(cfg: DictConfig) -> ToJudge:
    sampling = read_sampling(cfg)
    if cfg.generated is None:
        check_generator_source(cfg)
    if cfg.input is None:
        raise UsageError("give input=FOLDER with shards of procedural clips")
    if not (folder := Path(to_absolute_path(cfg.input))).exists():
        raise DataError(f"input={cfg.input}: no such folder; give shards of procedural clips")
    real = RealClips(folder, sampling.clip, cfg.clip.stride, cfg.clip.fps, instantiate(cfg.limits))
    if cfg.generated is None:
        generator = instantiate(cfg.generator).to(choose_device(cfg.device))
        name = model_name(cfg) if cfg.checkpoint is not None else Path(cfg.path or cfg.denoiser.path).name
        return videos_to_make(generator, name, real, sampling, cfg.prompts)
    if cfg.mode != "text":
        raise UsageError(f"mode={cfg.mode} needs checkpoint=FILE: it is not known what generated=DIR was given")
    return videos_to_read(Path(to_absolute_path(cfg.generated)), real)


def _settings(cfg: DictConfig, videos: ToJudge) -> dict[str, Any]:
    """The settings that were used, with the sizes and the solver known now; without those of sampling for a folder."""
    settings = plain(cfg)
    settings["clip"] = {**settings["clip"], **videos.real.shape._asdict()}
    if videos.solver is not None:
        return settings | {"solver": {key: getattr(videos.solver, key) for key in ("name", "steps", "shift")}}
    return {key: value for key, value in settings.items() if key not in _MAKING}
