"""Does sparse attention match dense attention here? One study in small, all variants on the same cached features.

Each variant is trained with each seed by `osp train experiment=t2v_tiny`, for the same number of steps, and judged by
`osp eval target=generation` on held-out prompts. Runs are processes of their own, in output/VARIANT/SEED; what is
finished is kept, and the same command goes on with the rest. When all are there, a training step of each variant is
timed, and output holds table.md, results.csv, results.json and plot.png.

All variants are one denoiser with other stages, of one width and number of blocks. Unless another is chosen it has
joint blocks, as cross-attention learns its prompts too slowly for so few steps. Sparse variants begin and end with a
dense block; 2+1D is the schedule of v1.0 and v1.1, without. `suv` is the sparse U with long skips, and `dense_u` the
same model with dense attention, which it is compared with. Any registered pattern makes a variant, called PATTERN or
PATTERN_kN.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.benchmark.study_costs import check_filling, costs, grid_of, random_batch, time_steps
from osp.benchmark.study_results import collect, make_rows, write
from osp.benchmark.study_runs import BLOCKS, DENOISER, EXPERIMENT, Run, Variant, run_all, train_overrides, variants
from osp.data.sources import FeatureClips
from osp.devices import autocast_dtype, choose_device, choose_precision, describe_device


@dataclass(frozen=True)
class Study:
    """The settings of a study.

    Args:
        features: cached features to train on; `heldout_features` to validate on.
        heldout: shards of clips whose captions are the prompts.
        steps: of each run; None: those of the experiment.
        denoiser: the configuration whose stages the variants change.
        variants: names, see `study_runs.variants`; None: all that such a denoiser has, without further patterns.
        jobs: runs at a time, of `threads` each.
        rounds: timed steps of each variant.
        compose: the settings of `osp train`, as plain values, that overrides make.
        build: an object of such settings (`_target_`).
    """

    features: Path
    heldout_features: Path
    heldout: Path
    output: Path
    compose: Callable[[Sequence[str]], Mapping[str, Any]]
    build: Callable[[Any], Any]
    denoiser: str = DENOISER
    variants: Sequence[str] | None = None
    seeds: int = 3
    steps: int | None = None
    prompts: int = 64
    jobs: int = 4
    threads: int = 1
    rounds: int = 30


def run_study(study: Study) -> dict[str, Any]:
    """Train and judge what is missing, time, and write the table; gives what it holds.

    Raises UsageError or DataError for what the user can mend, before any work where that is known.
    """
    plain = study.compose(
        [f"experiment={EXPERIMENT}", f"denoiser={study.denoiser}", f"data.train.path='{study.features}'"]
    )
    known = variants(BLOCKS, study.denoiser, "long_skips" in plain["denoiser"], study.variants or ())
    chosen = list(known.values()) if study.variants is None else [known[name] for name in study.variants]
    base = study.compose(train_overrides(known["dense"], study.features))
    device = choose_device("auto")
    precision = choose_precision(base["trainer"]["precision"], device)
    source = FeatureClips(study.features, base["data"]["train"]["patch_size"])
    torch.manual_seed(0)
    # References are timed even where they are not trained.
    timed = [name for name in known if any(name in (one.name, one.reference) for one in chosen)]
    settings = {name: study.compose(train_overrides(known[name], study.features)) for name in timed}
    models = {name: study.build(one["denoiser"]) for name, one in settings.items()}
    inputs = random_batch(source, study.build(base["text"]), base["data"]["batch_size"])
    check_filling(models, grid_of(models, inputs))

    steps = study.steps or base["trainer"]["max_steps"]
    runs = _runs(study, chosen, steps, precision)
    for run in runs:
        run.check(study.compose(run.overrides))
    run_all([run for run in runs if run.commands()], study.jobs, study.threads)

    torch.set_num_threads(study.threads)
    load = os.getloadavg()[0]
    seconds = time_steps(models, inputs, device, autocast_dtype(precision), study.rounds)
    outcomes = collect({one.name: [run.folder for run in runs if run.variant == one.name] for one in chosen})
    about = {"denoiser": study.denoiser, "steps": steps, "batch": base["data"]["batch_size"], "seeds": study.seeds}
    about |= {"device": describe_device(device), "precision": precision, "latent": list(inputs["latent"].shape)}
    about |= {"threads": study.threads, "rounds": study.rounds, "torch": torch.__version__}
    grid, prompts = grid_of(models, inputs), outcomes[chosen[0].name][0]["prompts"]
    place = f"{grid.tokens} tokens ({'x'.join(map(str, grid))}), text {_by(inputs['text'])}"
    notes = [_outcome_note(about, prompts), _time_note(about, place, load), _cost_note(chosen)]
    results = {"rows": make_rows(chosen, outcomes, costs(models, inputs, seconds)), "notes": notes, **about}
    write(study.output, results)
    return results


def _runs(study: Study, chosen: Sequence[Variant], steps: int, precision: str) -> list[Run]:
    """All of them, seed by seed."""
    same = [f"data.val.path='{study.heldout_features}'", "data.workers=0", "logged_clips=0"]
    same += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]  # validated once, at the end
    evaluation = [f"input='{study.heldout}'", f"prompts={study.prompts}", f"precision={precision}"]
    evaluation += ["contact_sheet_clips=0", "save_videos=1"]
    runs = []
    for seed in range(study.seeds):
        for one in chosen:
            folder = study.output / one.name / str(seed)
            overrides = [*train_overrides(one, study.features), *same, f"seed={seed}", f"output='{folder}'"]
            runs.append(Run(one.name, seed, folder, tuple(overrides), steps, tuple(evaluation)))
    return runs


def _outcome_note(about: Mapping[str, Any], prompts: int) -> str:
    return (
        f"{EXPERIMENT} with {about['denoiser']}: {about['steps']} steps of batch {about['batch']}, seeds 0 to "
        f"{about['seeds'] - 1}; mean ± standard deviation over the seeds. val/loss is that of the averaged weights "
        f"after the last step; prompt accuracy is colour, shape and motion right at once, of {prompts} held-out "
        "prompts. "
        "Changes to dense are from the dense run with the same seed, which draws the same noise in validation: "
        "val/loss itself varies with that draw."
    )


def _time_note(about: Mapping[str, Any], place: str, load: float) -> str:
    return (
        "A step is the denoiser's forward and backward pass, without text encoder and optimiser: latents "
        f"{'x'.join(map(str, about['latent']))}, {place}, {about['precision']}; median of {about['rounds']} rounds "
        f"through all variants; {about['device']}; torch {about['torch']}; load average before: {load:.2f}."
    )


def _cost_note(chosen: Sequence[Variant]) -> str:
    own: dict[str, list[str]] = {one.reference: [] for one in chosen}
    for one in chosen:
        own[one.reference].append(one.name)
    references = "; ".join(f"{reference} for {', '.join(names)}" for reference, names in own.items())
    return (
        "Parameters are the denoiser's. Attention distance is the average number of attentions from a token to another "
        "by the sparse blocks alone, ways through the text not counted. FLOPs are counted, of a step. Time and FLOPs "
        f"are divided by those of the dense model of the same kind: {references}."
    )


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
