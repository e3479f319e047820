"""What videos are made with: limits, and one place for them."""

from dataclasses import fields
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from osp.cli import config_folder
from osp.cli.settings import read_sampling
from osp.diffusion import Flow, Velocity
from osp.errors import DataError, UsageError
from osp.sampling.settings import ClipSize, Sampling, SolverSettings, check_setting


@pytest.mark.parametrize("config", [["sample", "prompt=a"], ["eval", "eval/target=generation", "input=x"]])
def test_the_configuration_says_what_is_so_by_default(config: list[str]) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose(config[0], config[1:])
    read, usual = read_sampling(cfg), Sampling()
    of_the_verb = {"batch_size", "mode"} if config[0] == "eval" else set()
    for one in fields(Sampling):
        assert config[0] == "eval" or one.name in cfg, one.name
        if one.name not in of_the_verb:
            assert getattr(read, one.name) == getattr(usual, one.name), one.name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance": -1}, "guidance=-1: must be a number of at least 0"),
        ({"guidance": float("inf")}, "guidance=inf: must be a number of at least 0"),
        ({"rescale": 1.5}, "rescale=1.5: must lie between 0 and 1"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number of at least 0"),
        ({"seed": None}, "seed=null: must be a whole number of at least 0"),
        ({"fps": 0}, "fps=0: must be a number of at least 0.001, or null: that of the training videos"),
        ({"clip": {"frames": 0}}, "clip.frames=0: must be a whole number of at least 1, or null: that of the training"),
        ({"solver": {"shift": 0}}, "solver.shift=0: must be a number above 0, or null: as in training"),
        ({"solver": {"name": "rk4"}}, "solver.name=rk4: is not known; choose euler, "),
        ({"solver": {"stepz": 3}}, "solver: key=stepz: is not known; choose name, steps, shift or options"),
        ({"memory": "tiny"}, "memory=tiny: is not known; choose normal or low"),
        ({"mode": "dream"}, "mode=dream: is not known; choose text, image, transition, continuation or frames"),
        ({"hold_given": "yes"}, "hold_given=yes: is not known; choose true or false"),
        ({"negative_prompt": 3}, "negative_prompt=3: must be text"),
        ({"template": "high quality"}, "template=high quality: has no {} for the prompt; give words with {} among"),
        ({"template": None}, "template=null: must be text"),
    ],
)
def test_what_is_out_of_its_limits_is_refused_by_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling.read(values)
    assert str(caught.value).startswith(message)


def test_names_that_are_no_setting_are_passed_over() -> None:
    read = Sampling.read({"clip": {"frames": 9, "stride": 2}, "output": "x", "solver": {"steps": 3}})
    assert read == Sampling(clip=ClipSize(frames=9), solver=SolverSettings(steps=3))


def test_a_setting_may_be_checked_under_another_name() -> None:
    check_setting("clip.height", 8, "line 3: height", DataError)
    with pytest.raises(DataError, match="line 3: height=0: must be a whole number of at least 1"):
        check_setting("clip.height", 0, "line 3: height", DataError)


def test_every_setting_says_what_it_means() -> None:
    for kind in (Sampling, ClipSize, SolverSettings):
        for one in fields(kind):
            assert one.name in ("clip", "solver") or one.metadata["meaning"], one.name


def test_the_solver_of_an_objective_is_as_by_default_where_nothing_is_said() -> None:
    solver = SolverSettings(steps=7, options={"a": 1}).build(Flow())
    assert (solver.name, solver.steps, dict(solver.options)) == ("euler", 7, {"a": 1})
    assert SolverSettings().build(Velocity()).name == "dpm++"
    assert dict(Sampling.read({"solver": {"options": None}}).solver.build(Flow()).options) == {}


def test_a_template_holds_the_prompt_and_none_turns_it_off() -> None:
    framed = Sampling(template="(best {x}), {}.")
    assert framed.worded("a cat {}") == "(best {x}), a cat {}."
    assert Sampling().worded("a cat {}") == "a cat {}"
    assert framed.negative() == ""


def test_a_negative_prompt_of_the_user_replaces_the_usual_one_within_its_own_template() -> None:
    published = Sampling(template="good, {}", usual_negative="blurry", negative_template="good, {}")
    assert published.negative() == "blurry"
    assert published.negative("dogs") == "good, dogs"
    assert published.negative("") == ""
    own = Sampling(usual_negative="blurry", negative_prompt="cats")
    assert own.negative() == "cats"
    assert own.negative("dogs") == "dogs"
