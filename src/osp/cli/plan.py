"""`osp plan`: whether a training run fits its devices, and what time and money it takes."""

from omegaconf import DictConfig, OmegaConf

from osp.checks import check_number
from osp.cli.plain import instantiate, plain
from osp.cli.printing import say, show_result
from osp.devices.datasheets import find_device
from osp.training.memory.advice import advise
from osp.training.memory.asked import Asked, read_asked, without_missing
from osp.training.memory.layout import Layout
from osp.training.memory.plan import plan_training
from osp.training.memory.refusal import refusal
from osp.training.memory.report import as_values, available, lines
from osp.training.memory.speed import estimate


def run(cfg: DictConfig) -> None:
    """Print the plan. Raises DoesNotFitError, after that, for a run that does not fit."""
    check_number("mfu", cfg.mfu, above=0, most=1)
    check_number("price", cfg.price, least=0, null="no cost")
    device = find_device(str(cfg.device)).changed(
        bf16_tflops=cfg.peak_tflops, fp32_tflops=cfg.peak_tflops, memory_gb=cfg.memory_gb
    )
    asked = asked_of(cfg)
    made, room = plan_training(asked), available(device)
    advice = [] if made.peak <= room else advise(asked, room)
    time = estimate(made, device, cfg.mfu, cfg.price)
    for line in lines(made, device, time, cfg.mfu, advice):
        say(line)
    show_result(as_values(made, device, time, advice))
    if made.peak > room:
        raise refusal(made, room, advice)


def asked_of(cfg: DictConfig) -> Asked:
    """The run that a configuration of `osp plan` asks for; paths that it does not give are not needed."""
    config = plain(OmegaConf.create(without_missing(plain(cfg, resolve=False))))
    device = find_device(config["device"])
    layout = Layout.of(config["trainer"], config["devices"], device.per_node)
    precision, accelerated = config["trainer"]["precision"], device.name != "cpu"
    if precision == "auto":
        precision = "bf16-mixed" if accelerated else "32-true"
    return read_asked(config, instantiate, layout, precision=precision, accelerated=accelerated)
