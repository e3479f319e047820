"""The settings to change so that a training run fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from osp.training.memory.asked import Asked, DenoiserWork
from osp.training.memory.plan import TrainingPlan, plan_training

_SEQUENCES = (2, 4, 8)


@dataclass(frozen=True)
class Advice:
    """Settings to change all together, as they stand in a command, and the plan of the run with them."""

    settings: tuple[str, ...]
    plan: TrainingPlan


def advise(asked: Asked, available: int) -> list[Advice]:
    """The changes in the order to try, each with those before it, up to the first with which the run fits.

    Empty where nothing is left to change.
    """
    tried: list[Advice] = []
    settings: tuple[str, ...] = ()
    for setting, changed in _changes(asked):
        key = setting.partition("=")[0]
        settings = (*(one for one in settings if one.partition("=")[0] != key), setting)
        tried.append(Advice(settings, plan_training(changed)))
        if tried[-1].plan.peak <= available:
            break
    return tried


def _changes(asked: Asked) -> Iterator[tuple[str, Asked]]:
    """Settings and the run with each of them and all before it."""
    work, layout = asked.work, asked.layout
    if isinstance(work, DenoiserWork) and work.recompute_every != 1:
        work = replace(work, recompute_every=1)
        asked = replace(asked, work=work)
        yield "module.recompute_every=1", asked
    if layout.devices > 1 and layout.kind != "fsdp":
        layout = layout.sharded()
        asked = replace(asked, layout=layout)
        yield "trainer=fsdp", asked
    if layout.kind == "fsdp" and layout.replicas > 1:
        layout = replace(layout, replicas=1)
        asked = replace(asked, layout=layout)
        yield "trainer.strategy.replicas=1", asked
    for sequence in _SEQUENCES if isinstance(work, DenoiserWork) and layout.kind == "fsdp" else ():
        if sequence > layout.sequence and layout.devices % sequence == 0 and asked.shares(sequence):
            asked = replace(asked, layout=replace(layout, sequence=sequence), accumulate=_kept(asked, sequence))
            yield f"trainer.strategy.sequence={sequence}", asked
    while asked.batch > 1:
        batch = asked.batch // 2
        asked = replace(asked, batch=batch, accumulate=-(-asked.accumulate * asked.batch // batch))
        yield f"data.batch_size={batch}", asked
    if asked.precision == "32-true" and asked.accelerated:
        asked = replace(asked, precision="bf16-mixed")
        yield "trainer.precision=bf16-mixed", asked
    if isinstance(work, DenoiserWork) and not work.offloads:
        asked = replace(asked, work=replace(work, offloads=True))
        yield "module.offload_activations=true", asked
    if layout.kind == "fsdp" and not layout.on_cpu:
        yield "trainer.strategy.offload_optimizer=true", replace(asked, layout=replace(asked.layout, on_cpu=True))


def _kept(asked: Asked, sequence: int) -> int:
    """Batches of a step that keep its clips, when more devices share each."""
    return asked.accumulate * sequence // asked.layout.sequence
