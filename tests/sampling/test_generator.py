"""Prompts to videos: what a video depends on, what the denoiser is given, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.conditioning import ConditionInputs, GivenFrames, WordText, given_by_mode, given_frames, latent_mask
from osp.data.media.shape import Shape
from osp.denoiser import CrossTransformer
from osp.diffusion import Epsilon, Flow, Objective, Solver, Velocity
from osp.errors import NotFiniteError, Stopped, UsageError
from osp.sampling import VideoGenerator, default_solver
from osp.sampling.progress import Progress
from osp.vae import WFVAE, LatentCodec

Make = Callable[..., VideoGenerator]
SIZE = (9, 32, 48)
# Sums are taken in another order where a batch, or a piece of a video, has another size.
CLOSE = {"rtol": 0, "atol": 2e-4}


def short(generator: VideoGenerator, name: str = "euler_ancestral") -> dict[str, Any]:
    return {"solver": Solver(generator.objective, name, 3), "guidance": 3.0}


@pytest.mark.parametrize("kind", ["cross", "inpaint", "joint"])
@pytest.mark.parametrize("objective", [Flow(), Velocity()])
def test_a_video_depends_on_its_prompt_and_seed_and_not_on_its_batch(
    make_generator: Make, kind: str, objective: Any
) -> None:
    generator = make_generator(kind, objective)
    settings = short(generator)
    together = generator.generate(["a red circle", "two blue squares turn"], *SIZE, seeds=[5, 6], **settings)
    alone = generator.generate(["two blue squares turn"], *SIZE, seeds=[6], **settings)
    assert together.shape == (2, 3, *SIZE)
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1
    torch.testing.assert_close(together[1:], alone, **CLOSE)
    again = generator.generate(["two blue squares turn"], *SIZE, seeds=[6], **settings)
    assert torch.equal(alone, again)
    for prompt, seed in (("two blue squares turn", 7), ("a red circle", 6)):
        other = generator.generate([prompt], *SIZE, seeds=[seed], **settings)
        assert (other - alone).abs().mean() > 1e-3


def test_guidance_leads_away_from_the_negative_prompt(make_generator: Make) -> None:
    generator = make_generator("joint")
    settings = short(generator)
    plain = generator.generate(["a red circle"], *SIZE, seeds=[0], **settings)
    negative = generator.generate(["a red circle"], *SIZE, seeds=[0], negative_prompt="blue", **settings)
    same = generator.generate(["a red circle"], *SIZE, seeds=[0], negative_prompt="a red circle", **settings)
    without = generator.generate(["a red circle"], *SIZE, seeds=[0], solver=settings["solver"], guidance=1.0)
    assert (plain - negative).abs().mean() > 1e-3
    assert (plain - without).abs().mean() > 1e-3
    torch.testing.assert_close(same, without, **CLOSE)


@pytest.mark.parametrize("kind", ["cross", "inpaint", "joint"])
def test_low_memory_changes_nothing_but_the_last_bits(make_generator: Make, kind: str) -> None:
    generator = make_generator(kind)
    prompts = ["a red circle", "two blue squares turn"]
    normal = generator.generate(prompts, *SIZE, seeds=[1, 2], **short(generator))
    low = generator.generate(prompts, *SIZE, seeds=[1, 2], **short(generator), low_memory=True)
    torch.testing.assert_close(low, normal, **CLOSE)


class Watched(CrossTransformer):
    """Remembers what it was given."""

    seen: list[Tensor]

    def forward(self, latent: Tensor, *inputs: Any, **named: Any) -> Tensor:
        self.seen.append(latent.clone())
        return super().forward(latent, *inputs, **named)


def watched(generator: VideoGenerator) -> list[Tensor]:
    generator.denoiser.__class__ = Watched
    generator.denoiser.seen = []
    return generator.denoiser.seen


@pytest.mark.parametrize("low", [False, True])
def test_given_frames_reach_the_denoiser_beside_the_noise_with_and_without_a_prompt(
    make_generator: Make, low: bool
) -> None:
    generator = make_generator("inpaint")
    seen = watched(generator)
    ends = [torch.full((3, *SIZE[1:]), 0.5), torch.full((3, *SIZE[1:]), -0.5)]
    given = given_by_mode("transition", ends, *SIZE)
    generator.generate(["a", "b"], *SIZE, seeds=[0, 1], given=given, **short(generator), low_memory=low)
    assert len(seen) == (6 if low else 3)
    with torch.no_grad():
        masked = generator.codec.encode(given.video)
    mask = latent_mask(given.mask, 4, 4, 6)
    for latent in seen:
        assert latent.shape == (2 if low else 4, 12, 3, 4, 6)
        torch.testing.assert_close(latent[:, 4:8], masked.expand(len(latent), -1, -1, -1, -1))
        assert torch.equal(latent[:, 8:], mask.expand(len(latent), -1, -1, -1, -1))
    assert mask[0, :, 0].sum() == 0
    assert mask[0, :, 1].min() == 1
    assert mask[0, :3, 2].min() == 1
    assert mask[0, 3, 2].max() == 0


@pytest.mark.parametrize("objective", [Flow(), Velocity(), Epsilon()])
def test_frames_given_from_the_first_on_come_out_as_they_are(make_generator: Make, objective: Objective) -> None:
    generator = make_generator("inpaint", objective)
    pictures = {number: torch.rand(3, *SIZE[1:]) * 2 - 1 for number in (0, 1, 2, 3, 4, 8)}  # the last after a gap
    given = given_frames(pictures, *SIZE)
    made: list[Tensor] = []
    for held in (True, False):
        states: list[Tensor | None] = []
        generator.generate(
            ["a"],
            *SIZE,
            seeds=[0],
            given=given,
            hold_given=held,
            progress=lambda progress, states=states: states.append(progress.state),
            **short(generator),
        )
        made.append([state for state in states if state is not None][-1])
    with torch.no_grad():
        whole = generator.codec.encode(given.video)
    torch.testing.assert_close(made[0][:, :, :2], whole[:, :, :2], atol=2e-3, rtol=0)
    assert (made[0][:, :, 2] - whole[:, :, 2]).abs().mean() > 0.1
    assert (made[1][:, :, :2] - whole[:, :, :2]).abs().mean() > 0.1


def test_given_frames_of_v12_are_encoded_so_without_being_asked(make_generator: Make) -> None:
    generator = make_generator("inpaint")
    settings = generator.denoiser.settings | {"frame_encoding": "v12"}
    older = CrossTransformer(**settings).eval()
    older.load_state_dict(generator.denoiser.state_dict())
    generator.denoiser = older
    seen = watched(generator)
    given = given_by_mode("transition", [torch.full((3, *SIZE[1:]), value) for value in (0.5, -0.5)], *SIZE)
    together = generator.generate(["a", "b"], *SIZE, seeds=[0, 1], given=given, **short(generator))
    mask = latent_mask(given.mask, 4, 4, 6, "v12")
    assert all(torch.equal(latent[:, 8:], mask.expand(len(latent), -1, -1, -1, -1)) for latent in seen)
    assert (seen[0][0, 4:8] - seen[0][1, 4:8]).abs().mean() > 1e-3  # samples of the posterior
    alone = generator.generate(["b"], *SIZE, seeds=[1], given=given, **short(generator))
    torch.testing.assert_close(together[1:], alone, **CLOSE)


def test_the_noise_is_taken_from_a_model_that_learned_a_variance_too(make_generator: Make) -> None:
    learned = make_generator("cross", Epsilon(learned_variance=True), out_channels=8)
    plain = make_generator("cross", Epsilon())
    assert learned.denoiser.out.out_features == 2 * plain.denoiser.out.out_features
    state = learned.denoiser.state_dict()
    # Patches hold all channels of a place together; the first half of them is the noise.
    state |= {key: state[key].unflatten(0, (4, 8))[:, :4].flatten(0, 1) for key in ("out.weight", "out.bias")}
    plain.denoiser.load_state_dict(state)
    plain.text.load_state_dict(learned.text.state_dict())  # type: ignore[attr-defined]
    plain.codec = learned.codec
    made = [each.generate(["a"], *SIZE, seeds=[0], **short(each)) for each in (learned, plain)]
    torch.testing.assert_close(made[0], made[1], **CLOSE)
    with pytest.raises(UsageError, match=r"out_channels=4: Epsilon with learned_variance"):
        make_generator("cross", Epsilon(learned_variance=True))


def test_an_inpainting_model_without_given_frames_generates_them_all(make_generator: Make) -> None:
    generator = make_generator("inpaint")
    seen = watched(generator)
    text = generator.generate(["a"], *SIZE, seeds=[0], **short(generator))
    assert all(latent[:, 8:].min() == 1 for latent in seen)
    none = generator.generate(["a"], *SIZE, seeds=[0], given=given_frames({}, *SIZE), **short(generator))
    assert torch.equal(text, none)


def test_each_video_of_a_batch_may_have_its_own_given_frames(make_generator: Make) -> None:
    generator = make_generator("inpaint")
    given = [given_frames({number: torch.zeros(3, *SIZE[1:])}, *SIZE) for number in (0, 8)]
    both = GivenFrames(torch.cat([each.mask for each in given]), torch.cat([each.video for each in given]))
    together = generator.generate(["a", "b"], *SIZE, seeds=[0, 1], given=both, **short(generator))
    alone = generator.generate(["b"], *SIZE, seeds=[1], given=given[1], **short(generator))
    torch.testing.assert_close(together[1:], alone, **CLOSE)


def test_weights_in_half_precision_leave_the_solver_in_float32(make_generator: Make) -> None:
    generator = make_generator("joint")
    generator.denoiser.bfloat16()
    states: list[Tensor | None] = []
    settings = short(generator)
    video = generator.generate(
        ["a red circle"], *SIZE, seeds=[0], **settings, progress=lambda progress: states.append(progress.state)
    )
    assert [state.dtype for state in states if state is not None] == [torch.float32] * 3
    assert video.isfinite().all()


def test_the_solver_is_that_of_the_objective_where_none_is_given(make_generator: Make) -> None:
    assert (default_solver(Flow()).name, default_solver(Velocity()).name) == ("euler", "dpm++")
    for objective in (Flow(), Velocity()):
        told: list[Progress] = []
        generator = make_generator("cross", objective)
        generator.generate(["a"], 1, 16, 16, seeds=[0], progress=told.append)
        steps = default_solver(objective).steps
        assert every(told, "denoise") == [(done, steps) for done in range(steps + 1)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 18}, "frames=18: .*; use 17 or 21"),
        ({"frames": 0}, "frames=0: .*; use 1"),
        ({"height": 40}, "height=40: .*; use 32 or 48"),
        ({"width": 8}, "width=8: .*; use 16"),
        ({"prompts": ["  "]}, "prompt is empty"),
        ({"prompts": ["a " * 8]}, "has 9 tokens, and words reads 8"),
        ({"negative_prompt": "a " * 8}, "has 9 tokens, and words reads 8"),
        ({"seeds": [1, 2]}, "1 prompts and 2 seeds"),
        ({"seeds": [-1]}, "seed=-1: must be a whole number of at least 0"),
        ({"guidance": -1.0}, "guidance=-1.0: must be a number of at least 0"),
        ({"rescale": 2.0}, "rescale=2.0: must lie between 0 and 1"),
        ({"solver": Solver(Velocity(), "ddim", 10)}, "the denoiser learned Flow"),
        ({"solver": Solver(Flow(), "euler", 10, options={"colour": 1})}, "has no options.colour"),
        ({"given": given_frames({}, *SIZE)}, "was not trained with any"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_computed(
    make_generator: Make, changed: dict[str, Any], message: str
) -> None:
    generator = make_generator()
    seen = watched(generator)
    settings = {"prompts": ["a red circle"], "frames": 9, "height": 32, "width": 48, "seeds": [0], **changed}
    for function in (generator.check, generator.generate):
        with pytest.raises(UsageError, match=message):
            function(**settings)
    assert not seen


def test_given_frames_of_another_size_are_refused(make_generator: Make) -> None:
    generator = make_generator("inpaint")
    with pytest.raises(UsageError, match=r"9 x 32 x 32 .* has 9 x 32 x 48"):
        generator.check(["a"], *SIZE, seeds=[0], given=given_frames({}, 9, 32, 32))


def test_parts_that_do_not_fit_together_are_refused(make_generator: Make) -> None:
    good = make_generator("joint")
    flows = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    other = LatentCodec(WFVAE(latent_channels=8, base_channels=4, level1="2d", **flows), 0.0, 1.0)
    with pytest.raises(UsageError, match=r"latents of 4 channels, .* have 8"):
        VideoGenerator(good.denoiser, good.text, good.objective, other)
    with pytest.raises(UsageError, match=r"text 16 wide, .* gives 8"):
        VideoGenerator(good.denoiser, WordText(8, 16, 1, 2), good.objective, good.codec)
    with pytest.raises(UsageError, match=r"pooled text 16 wide, .* gives none"):
        VideoGenerator(good.denoiser, WordText(16, None, 1, 2), good.objective, good.codec)
    eight = LatentCodec(WFVAE(latent_channels=4, base_channels=4, level1="3d", **flows), 0.0, 1.0)
    with pytest.raises(UsageError, match=r"frame_channels=\[4, 4\] .* \[4, 8\]"):
        VideoGenerator(make_generator("inpaint").denoiser, good.text, good.objective, eight)


class Marks:
    """A condition of another kind: channels beside the latent, or none, which guidance leads away from."""

    guided = True

    def __init__(self, value: float, beside: int = 8) -> None:
        self.value, self.beside = value, beside

    def channels(self, codec: LatentCodec) -> int:
        return self.beside

    def check(self, size: Shape, videos: int) -> None:
        assert (size, videos) == (Shape(*SIZE), 2)

    def encode(self, codec: LatentCodec, denoiser: object = None, generators: object = None) -> ConditionInputs:
        shape = 1, self.beside, *codec.latent_shape(*SIZE)[1:]
        return ConditionInputs(torch.full(shape, self.value) if self.beside else None)

    def without(self) -> "Marks":
        return Marks(0.0, self.beside)


@pytest.mark.parametrize("low", [False, True])
def test_a_condition_of_another_kind_needs_no_change_in_the_generator(make_generator: Make, low: bool) -> None:
    generator = make_generator("inpaint")
    seen = watched(generator)
    generator.generate(["a", "b"], *SIZE, seeds=[0, 1], given=Marks(2.0), low_memory=low, **short(generator))
    values = [[float(row[4:].mean()) for row in latent] for latent in seen]
    assert values == ([[2.0, 2.0], [0.0, 0.0]] * 3 if low else [[0.0, 0.0, 2.0, 2.0]] * 3)


def test_a_condition_without_channels_needs_no_frames(make_generator: Make) -> None:
    generator = make_generator("cross")
    asked: dict[str, Any] = {"seeds": [0, 1], **short(generator)}
    plain = generator.generate(["a", "b"], *SIZE, **asked)
    assert torch.equal(generator.generate(["a", "b"], *SIZE, given=Marks(2.0, beside=0), **asked), plain)
    with pytest.raises(UsageError, match="frames are given"):
        generator.check(["a", "b"], *SIZE, given=Marks(2.0), **asked)


def every(told: list[Progress], step: str) -> list[tuple[int, int]]:
    return [(one.done, one.total) for one in told if one.step == step]


@pytest.mark.parametrize("low", [False, True])
def test_progress_counts_the_pieces_of_each_step(make_generator: Make, low: bool) -> None:
    told: list[Progress] = []
    generator = make_generator("inpaint")
    size = (17, 256, 256)  # decoded in more pieces than one
    generator.generate(["a", "b"], *size, seeds=[0, 1], low_memory=low, progress=told.append, **short(generator))
    assert every(told, "encode") == [(0, 2), (1, 2), (2, 2)]
    assert every(told, "denoise") == [(0, 3), (1, 3), (2, 3), (3, 3)]
    decoded = every(told, "decode")
    frames = 34 if low else 17
    assert decoded[0] == (0, frames)
    assert decoded[-1] == (frames, frames)
    assert len(decoded) >= 3
    assert sorted(decoded) == decoded
    parts = [one.part for one in told]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == (0, 1)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", ["inpaint", "joint"])
def test_a_stop_between_any_two_pieces_leaves_the_generator_usable(make_generator: Make, kind: str, low: bool) -> None:
    generator = make_generator(kind)
    arguments: dict[str, Any] = {"seeds": [0, 1], "low_memory": low, **short(generator)}
    told: list[Progress] = []
    wanted = generator.generate(["a", "b"], *SIZE, progress=told.append, **arguments)
    for number in range(len(told)):
        reached: list[Progress] = []

        def stop(progress: Progress, number: int = number, reached: list[Progress] = reached) -> None:
            if len(reached) == number:
                raise Stopped(f"{progress.step} {progress.done}")
            reached.append(progress)

        with pytest.raises(Stopped, match=f"{told[number].step} {told[number].done}"):
            generator.generate(["a", "b"], *SIZE, progress=stop, **arguments)
        assert len(reached) == number
    assert torch.equal(generator.generate(["a", "b"], *SIZE, **arguments), wanted)


def test_a_stop_with_low_memory_takes_every_part_off_the_device(
    make_generator: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which part is where is noted, as there may be no accelerator: the CPU stands for it, as "cpu:0"."""
    generator = make_generator("inpaint").to("cpu:0")
    places: dict[str, str] = {}
    for name in ("text", "codec"):
        part = getattr(generator, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: places.update({name: str(device)}))
    for number in range(7):
        left = iter(range(number))

        def stop(progress: Progress, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            generator.generate(["a"], *SIZE, seeds=[0], low_memory=True, progress=stop, **short(generator))
        assert set(places.values()) <= {"cpu"}, number
    assert set(places) == {"text", "codec"}


def test_the_three_steps_are_what_generate_arranges(make_generator: Make) -> None:
    generator = make_generator("inpaint")
    settings = short(generator)
    given = given_frames({0: torch.zeros(3, *SIZE[1:])}, *SIZE)
    encoded = generator.encode(["a", "b"], *SIZE, negative_prompt="c", given=given)
    latents = [generator.denoise(encoded, seeds=[3, 4], **settings) for _ in range(2)]
    assert torch.equal(*latents)
    assert latents[0].shape == (2, *generator.codec.latent_shape(*SIZE))
    whole = generator.generate(["a", "b"], *SIZE, negative_prompt="c", given=given, seeds=[3, 4], **settings)
    assert torch.equal(generator.decode(latents[0], SIZE[0]), whole)
    cut = generator.decode(latents[0], SIZE[0] - 1)
    assert torch.equal(cut, whole[:, :, :-1])


@pytest.mark.parametrize("part", ["text", "denoiser", "codec"])
def test_numbers_that_are_not_finite_end_it_and_name_the_part(
    part: str, make_generator: Callable[..., VideoGenerator]
) -> None:
    generator = make_generator()
    network = generator.codec.vae.decoder if part == "codec" else getattr(generator, part)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    named = {"text": "text encoder", "denoiser": "denoiser", "codec": "pixels that the VAE"}[part]
    for low_memory in (False, True):
        with pytest.raises(NotFiniteError, match=f"{named}.*are not finite"):
            generator.generate("a ball", 5, 16, 16, low_memory=low_memory)


def test_what_is_plainly_meant_is_taken(make_generator: Callable[..., VideoGenerator]) -> None:
    generator = make_generator(clip={"frames": 5, "height": 16, "width": 16})
    video = generator.generate(["a ball"], 5, 16, 16, seeds=[3], solver=Solver(Flow(), "euler", 30))
    assert torch.equal(generator.generate("a ball", seeds=3, solver="euler"), video)
    with pytest.raises(UsageError, match="solver: name=x is not known; choose"):
        generator.generate("a ball", solver="x")
    with pytest.raises(UsageError, match="seeds=x: must be a whole number, or a list"):
        generator.generate("a ball", seeds="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="frames: is to be given"):
        make_generator().generate("a ball")
