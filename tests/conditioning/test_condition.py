"""How conditions reach the denoiser, whatever they are."""

import pytest
import torch

from osp.conditioning import ConditionInputs, EncodedText, call_denoiser, denoiser_inputs, find_mix, given_frames
from osp.conditioning.frames import latent_mask
from osp.data.media.shape import Shape
from osp.denoiser import CrossTransformer, JointTransformer, Stage
from osp.errors import UsageError
from osp.vae import LatentCodec
from osp.vae.lowest_band import LowestBand

SIZE = Shape(9, 16, 24)


def codec() -> LatentCodec:
    return LatentCodec(LowestBand(4), 0.0, 1.0)


def text(videos: int) -> EncodedText:
    return EncodedText(torch.randn(videos, 5, 16), torch.ones(videos, 5).bool(), torch.randn(videos, 8))


def test_the_denoiser_is_given_text_and_conditions_by_name() -> None:
    both = ConditionInputs(torch.randn(2, 7, 3, 2, 3), named={"history": torch.randn(2, 4, 16)})
    cross = CrossTransformer([Stage(1)], heads=1, head_dim=12, text_channels=16)
    joint = JointTransformer([Stage(1)], heads=1, head_dim=16, text_channels=16, pooled_channels=8)
    assert denoiser_inputs(cross, text(2)).keys() == {"text", "text_mask"}
    assert denoiser_inputs(joint, text(2), both).keys() == {"text", "text_mask", "pooled_text", "beside", "history"}


def test_what_is_for_one_video_serves_as_many_as_there_are() -> None:
    one = ConditionInputs(
        torch.randn(1, 7, 3, 2, 3), {"history": torch.randn(1, 4, 16)}, known=torch.ones(1, 1, 3, 1, 1)
    )
    three = one.expanded(3)
    assert three.beside is not None
    assert three.known is not None
    assert three.clean is None
    assert [len(value) for value in (three.beside, three.named["history"], three.known)] == [3, 3, 3]
    assert torch.equal(three.beside[2], three.beside[0])


def test_given_frames_are_known_up_to_the_first_gap() -> None:
    pictures = {number: torch.rand(3, 16, 24) for number in (0, 1, 2, 3, 4, 8)}
    inputs = given_frames(pictures, *SIZE).encode(codec())
    assert inputs.beside is not None
    assert inputs.clean is not None
    assert inputs.known is not None
    assert inputs.beside.shape == (1, 3 + 4, 3, 2, 3)
    assert torch.equal(inputs.beside[:, :3], inputs.clean)
    assert inputs.known.flatten().tolist() == [True, True, False]


def test_given_frames_are_encoded_as_the_denoiser_s_version_has_it() -> None:
    shape = {"channels": 3, "out_channels": 3, "frame_channels": [3, 4], "heads": 1, "head_dim": 12}
    v12, v13 = (CrossTransformer([Stage(1)], **shape, frame_encoding=version) for version in ("v12", "v13"))
    given = given_frames({0: torch.rand(3, 16, 24), 8: torch.rand(3, 16, 24)}, *SIZE)

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    usual, mean = given.encode(codec(), v13, seeded(1)), given.encode(codec(), v12)
    assert usual.beside is not None
    assert mean.beside is not None
    assert torch.equal(usual.beside, given.encode(codec()).beside)
    assert torch.equal(mean.beside[:, :3], usual.beside[:, :3])
    assert torch.equal(mean.beside[:, 3:], latent_mask(given.mask, 4, 2, 3, "v12"))
    assert not torch.equal(mean.beside[:, 3:], usual.beside[:, 3:])
    # Each video has a sample of the posterior by its own generator, also where all are given the same frames.
    drawn = given.encode(codec(), v12, seeded(1, 2)).expanded(2)
    alone = given.encode(codec(), v12, seeded(2))
    assert drawn.beside is not None
    assert drawn.clean is not None
    assert alone.beside is not None
    torch.testing.assert_close(drawn.beside[1:], alone.beside)
    assert torch.equal(drawn.beside[:, :3], drawn.clean)
    assert torch.equal(drawn.beside[:, 3:], mean.beside[:, 3:].expand(2, -1, -1, -1, -1))
    # Which latent frames are known does not depend on the order of the mask's channels.
    assert torch.equal(mean.known, usual.known)


def test_given_frames_are_not_led_away_from_and_without_them_none_is_known() -> None:
    given = given_frames({0: torch.rand(3, 16, 24)}, *SIZE)
    assert not given.guided
    nothing, none = given.without().encode(codec()), given_frames({}, *SIZE).encode(codec())
    assert nothing.beside is not None
    assert none.beside is not None
    assert torch.equal(nothing.beside, none.beside)
    assert nothing.known is not None
    assert not nothing.known.any()


def test_given_frames_are_for_one_size_and_one_number_of_videos() -> None:
    given = given_frames({0: torch.rand(3, 16, 24)}, *SIZE)
    given.check(SIZE, 3)
    with pytest.raises(UsageError, match=r"for 9 x 16 x 24 .*, and the video has 9 x 16 x 16"):
        given.check(Shape(9, 16, 16), 1)
    drawn = find_mix("stage2").draw_given(torch.rand(2, 3, *SIZE), [torch.Generator().manual_seed(i) for i in (0, 1)])
    drawn.check(SIZE, 2)
    with pytest.raises(UsageError, match="for 2 videos, and there are 3"):
        drawn.check(SIZE, 3)


def test_noise_is_on_the_kept_frames_alone() -> None:
    video = torch.rand(2, 3, *SIZE)
    seeds = [[torch.Generator().manual_seed(i) for i in (0, 1)] for _ in range(2)]
    still, noisy = (
        find_mix("stage2").draw_given(video, own, noise) for own, noise in zip(seeds, (False, True), strict=True)
    )
    assert torch.equal(still.mask, noisy.mask)
    kept = (still.mask == 0)[:, None].expand_as(video)
    assert torch.equal(still.video[kept], video[kept])
    assert (noisy.video[kept] != video[kept]).float().mean() > 0.99
    assert not noisy.video[~kept].any()


def test_a_latent_without_its_conditions_is_refused() -> None:
    model = CrossTransformer([Stage(1)], channels=3, out_channels=3, frame_channels=[3, 4], heads=1, head_dim=12)
    with pytest.raises(UsageError, match="the denoiser takes 10 channels, and the latent with its conditions has 3"):
        call_denoiser(model, torch.randn(1, 3, 3, 2, 4), torch.zeros(1), text=torch.zeros(1, 1, 16))
