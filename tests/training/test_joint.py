"""Joint training on clips and images: what is trained on, that it goes on exactly, and what is refused."""

import copy
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.media.errors import ClipError
from osp.data.media.video import to_float
from osp.data.sources import BucketClips, ClipSource, FeatureClips, FirstClips, JointClips, SyntheticClips
from osp.denoiser import CrossTransformer, LatteTransformer
from osp.diffusion import Epsilon, Flow, Objective, Solver
from osp.errors import UsageError
from osp.seeds import seeded
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.checkpoints import load_trained_generator
from osp.training.clipping import NormClipping
from osp.training.denoiser_module import DenoiserModule
from osp.training.encode_features import encode_features
from osp.training.joint import evenly_spaced
from osp.training.saving import LastCheckpoint
from osp.vae import WFVAE, LatentCodec
from osp.weights.pretrained import save_pretrained

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).parent))

from test_denoiser_module import SHAPES, write_features

from learned_variance import noise_errors

SMALL: dict[str, Any] = {"channels": 4, "heads": 1, "head_dim": 12, "text_channels": 8, "pairs": 1, "frames": 3}
SMALL |= {"native_rows": 2, "position_scale": (1.0, 1.0, 1.0)}
OBJECTIVES = {"plain": Epsilon(), "learned variance": Epsilon(learned_variance=True)}


def videos(clips: int = 8, side: int = 32) -> SyntheticClips:
    return SyntheticClips(clips, 9, side, side, objects=1, plain=True)


def pictures(clips: int = 6, side: int = 32) -> SyntheticClips:
    return SyntheticClips(clips, 1, side, side, seed=7, objects=1, plain=True)


def new_codec(folder: Path) -> LatentCodec:
    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    vae = WFVAE(**sizes, encoder_blocks=1, decoder_blocks=1, attention=False)
    save_pretrained(vae, folder / "vae")
    vae.origin = str(folder / "vae")
    return LatentCodec(vae, 0.0, 1.0)


def new_module(folder: Path, objective: Objective | None = None, **settings: Any) -> DenoiserModule:
    objective = objective or Epsilon()
    torch.manual_seed(3)
    denoiser = LatteTransformer(**SMALL, out_channels=objective.prediction_channels(4))
    for name, parameter in denoiser.named_parameters():  # a new one predicts zero, and reads no text
        if name.endswith(("text_out.weight", "out.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
    defaults = {"denoiser": denoiser, "text": text, "objective": objective, "codec": new_codec(folder)}
    return DenoiserModule(**{**defaults, "lr": 1e-3, "ema_decay": 0.9, **settings})


def data_of(train: ClipSource, workers: int = 0) -> ClipDataModule:
    return ClipDataModule(train, videos(2), batch_size=2, workers=workers)


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["train/loss"]))


def fit(folder: Path, module: DenoiserModule, data: ClipDataModule, steps: int, resume: Path | None = None) -> Losses:
    losses = Losses()
    lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[losses, LastCheckpoint(folder, 3)],
        plugins=[AtomicCheckpointIO()],
    ).fit(module, data, ckpt_path=resume, weights_only=True)
    return losses


def by_hand(module: DenoiserModule, batch: dict[str, Any], images: int) -> Tensor:
    """The loss of a joint batch, a clip after the other, each with its images one by one; and its gradients."""
    denoiser, codec = module.denoiser, module.codec
    assert codec is not None
    assert module.text is not None
    total, values = torch.zeros(()), 0
    for row, sample in enumerate(batch["sample"].tolist()):
        generator = seeded(0, "train", sample)
        video = to_float(batch["video"][row : row + 1])
        parts = [codec.encode(video, [generator])]
        own = batch.get("images")
        for i in range(images):
            frame = evenly_spaced(9, images)[i]
            picture = video[:, :, frame, None] if own is None else to_float(own[row : row + 1, :, i, None])
            parts.append(codec.encode(picture, [generator]))
        captions = [batch["caption"][row]]
        captions += captions * images if own is None else batch["image_captions"][row]
        time = module.objective.sample_time(1, [generator], tokens=4)
        dropped = bool(torch.rand((), generator=generator) < module.texts.dropout)
        clean = torch.cat(parts, dim=2)
        noise = torch.randn(clean.shape[1:], generator=generator)[None]
        text = module.text(["" if dropped else one for one in captions])
        noisy = module.objective.corrupt(clean, noise, time)
        predicted = [denoiser(noisy[:, :, :3], time, text.text[:1], text.mask[:1])]
        predicted += [
            denoiser(noisy[:, :, 3 + i, None], time, text.text[1 + i, None], text.mask[1 + i, None])
            for i in range(images)
        ]
        errors, counted = module.objective.error(torch.cat(predicted, dim=2), clean, noise, time)
        total, values = total + errors.sum(), values + int(counted.sum())
    return total / values


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["own frames", "further images"])
def test_a_step_is_the_loss_over_frames_and_images_alike(tmp_path: Path, kind: str, objective: str) -> None:
    joint = JointClips(videos(), pictures(), 2) if kind == "further images" else videos()
    module = new_module(
        tmp_path,
        OBJECTIVES[objective],
        joint_images=0 if kind == "further images" else 3,
        lr=0.0,
        clipping=NormClipping(1e9),
        text_dropout=0.5,
    )
    other = copy.deepcopy(module)
    data = data_of(joint)
    losses = fit(tmp_path, module, data, 1)
    batch: Any = next(iter(data_of(joint).train_dataloader()))
    expected = by_hand(other, batch, 2 if kind == "further images" else 3)
    assert losses.found[0] == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    ours = dict(module.denoiser.named_parameters())
    for name, value in other.denoiser.named_parameters():
        if value.grad is not None and value.grad.abs().max() > 1e-6:
            torch.testing.assert_close(
                ours[name].grad, value.grad, rtol=1e-3, atol=1e-5 * float(value.grad.abs().max())
            )


@pytest.mark.parametrize("kind", ["own frames", "further images, workers"])
def test_a_resumed_run_repeats_an_uninterrupted_one_to_the_bit(tmp_path: Path, kind: str) -> None:
    def run(folder: str, steps: int, resume: Path | None = None) -> tuple[DenoiserModule, Losses]:
        further = kind.startswith("further")
        train = JointClips(videos(), pictures(), 2) if further else videos()
        objective = OBJECTIVES["learned variance" if further else "plain"]
        module = new_module(tmp_path, objective, joint_images=0 if further else 2)
        return module, fit(tmp_path / folder, module, data_of(train, int("workers" in kind)), steps, resume)

    whole, all_of_it = run("whole", 6)
    run("part", 3)
    resumed, rest = run("part", 6, tmp_path / "part" / "last.ckpt")
    assert all_of_it.found[3:] == rest.found
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if isinstance(value, Tensor))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_trained_latte_samples_clips_of_its_length_and_images(tmp_path: Path, objective: str) -> None:
    module = new_module(tmp_path, OBJECTIVES[objective], joint_images=2)
    fit(tmp_path, module, data_of(videos()), 3)
    generator = load_trained_generator(tmp_path / "last.ckpt")
    assert isinstance(generator.denoiser, LatteTransformer)
    solver = Solver(generator.objective, "ddim", 2)
    assert generator.generate("a red circle", 9, 32, 32, solver=solver).shape == (1, 3, 9, 32, 32)
    assert generator.generate("a red circle", 1, 48, 32, solver=solver).shape == (1, 3, 1, 48, 32)
    message = "frames=13: makes 4 latent frames, and this denoiser takes 3, the length that it was trained at; use "
    with pytest.raises(UsageError, match=message + "frames=9, or 1 for an image"):
        generator.generate("a red circle", 13, 32, 32, solver=solver)


def test_the_images_of_a_clip_follow_from_its_key_and_draw() -> None:
    joint = JointClips(videos(), pictures(), 3)
    one = joint.read(2, 11)
    again, other, clip = JointClips(videos(), pictures(), 3).read(2, 11), joint.read(2, 12), videos().read(2, 11)
    assert one["images"].shape == (3, 3, 32, 32)
    assert torch.equal(one["images"], again["images"])
    assert torch.equal(one["video"], clip["video"])
    assert one["image_captions"] == again["image_captions"] != other["image_captions"]
    every = [pictures().read(i, 0) for i in range(6)]
    for image, caption in zip(one["images"].unbind(1), one["image_captions"], strict=True):
        assert any(torch.equal(image, each["video"][:, 0]) and caption == each["caption"] for each in every)
    batch = joint.collate([one, other])
    assert batch["images"].shape == (2, 3, 3, 32, 32)
    assert batch["image_captions"] == [one["image_captions"], other["image_captions"]]
    fewer = FirstClips(joint, 2)
    assert (fewer.images, len(fewer), len(joint)) == (3, 2, 8)
    others = (JointClips(videos(), pictures(), 2), JointClips(videos(), pictures(5), 3))
    assert joint.fingerprint() not in {one.fingerprint() for one in others}


def test_every_picture_is_read_in_time_and_none_twice_beside_a_clip() -> None:
    joint = JointClips(videos(), pictures(), 6)
    for draw in range(3):
        assert sorted(joint._chosen("a", draw)) == [*range(6)]
    few = JointClips(videos(), pictures(), 1)
    assert {few._chosen("a", draw)[0] for draw in range(60)} == {*range(6)}


def test_an_image_of_another_size_costs_its_clip() -> None:
    with pytest.raises(ClipError, match="is of 1 x 48 x 48, where an image of the clip's size goes beside it"):
        JointClips(videos(), pictures(side=48), 1).read(0, 0)
    with pytest.raises(ClipError, match="is of 9 x 32 x 32, where an image"):
        JointClips(videos(), videos(), 1).read(0, 0)


@pytest.mark.parametrize(("frames", "count", "expected"), [(17, 4, [0, 5, 10, 16]), (9, 1, [0]), (5, 5, [*range(5)])])
def test_own_frames_are_evenly_spaced(frames: int, count: int, expected: list[int]) -> None:
    assert evenly_spaced(frames, count) == expected


def refused(tmp_path: Path, match: str, train: ClipSource, **settings: Any) -> None:
    with pytest.raises(UsageError, match=match) as raised:
        new_module(tmp_path, **settings).prepare(data_of(train))
    assert "\n" not in str(raised.value)


def test_what_does_not_go_together_is_refused_before_training(tmp_path: Path) -> None:
    cross = CrossTransformer([{"blocks": 1}], channels=4, out_channels=4, heads=1, head_dim=12, text_channels=8)
    joint = JointClips(videos(), pictures(), 2)
    refused(tmp_path, "images=2: CrossTransformer takes no joint batches of clips and images", joint, denoiser=cross)
    refused(tmp_path, "joint_images=3: the clips of data.train bring 2 images each", joint, joint_images=3)
    refused(tmp_path, "joint_images=10: the clips have 9 frames; ask for fewer", videos(), joint_images=10)
    refused(tmp_path, "joint_images=-1: must be a whole number", videos(), joint_images=-1)
    refused(tmp_path, "frames=13: makes 4 latent frames, and this denoiser", SyntheticClips(4, 13, 32, 32))
    with pytest.raises(UsageError, match="images=7: there are 6 pictures; ask for fewer"):
        JointClips(videos(), pictures(), 7)
    with pytest.raises(UsageError, match="its clips bring 2 images each, which features"):
        encode_features(joint, None, None)  # type: ignore[arg-type]


class Sized(SyntheticClips):
    """Clips that say they have buckets."""

    buckets = BucketClips.buckets
    _buckets: list[Any] = []  # noqa: RUF012


def test_clips_of_several_sizes_and_features_bring_no_images() -> None:
    with pytest.raises(UsageError, match="videos have several sizes; give clips of one size, not buckets"):
        JointClips(Sized(4, 9, 32, 32), pictures(), 1)
    features = pictures()
    features.made_with = object()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="pictures are features, which hold no pixels; give shards or a folder"):
        JointClips(videos(), features, 1)


def test_a_flow_trains_jointly_too(tmp_path: Path) -> None:
    module = new_module(tmp_path, Flow(shift=1.0), joint_images=2)
    losses = fit(tmp_path, module, data_of(videos()), 2)
    assert all(0 < loss < 100 for loss in losses.found)


@torch.no_grad()
def test_runs_are_compared_by_the_noise_that_they_predict_alone(tmp_path: Path) -> None:
    module = new_module(tmp_path, OBJECTIVES["learned variance"])
    with torch.enable_grad():
        fit(tmp_path, module, data_of(videos()), 3)
    generator = load_trained_generator(tmp_path / "last.ckpt")
    clips = FeatureClips(write_features(tmp_path / "features", SHAPES[:1], clips=4), sample=False)
    errors = noise_errors(generator, clips)
    assert errors.shape == (4,)
    assert torch.equal(errors, noise_errors(generator, clips))
    rows = generator.denoiser.out.weight.view(4, 8, -1)  # of a patch, channels last
    rows[:, 4:] *= 5
    assert torch.equal(errors, noise_errors(generator, clips))
    rows[:, :4] *= 5
    assert (errors - noise_errors(generator, clips)).abs().min() > 0
