"""Training a denoiser: the loss and its gradient, however a step is split; exact resume; what a run begins with."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from osp.conditioning import EncodedText, TextEncoder, WordText, find_mix
from osp.conditioning.frames import latent_mask
from osp.data.buckets import TokenRule
from osp.data.datamodule import ClipDataModule
from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter
from osp.data.media.shape import Shape
from osp.data.media.video import to_float
from osp.data.shards.build import write_rendered
from osp.data.sources import BucketClips, FeatureClips, SyntheticClips
from osp.denoiser import CrossTransformer, JointTransformer
from osp.diffusion import Epsilon, Flow, Objective, Velocity
from osp.errors import DataError, UsageError
from osp.seeds import stable_seed
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.checkpoints import load_trained_generator
from osp.training.clipping import AbnormalDrop, AdaptiveClipping, DivergedError, NormClipping
from osp.training.denoiser_module import DenoiserModule
from osp.training.peek import has_captions
from osp.training.saving import BestCheckpoint, LastCheckpoint
from osp.training.text_input import TextInput
from osp.vae import WFVAE, LatentCodec
from osp.weights.pretrained import save_pretrained

STAGES = [{"blocks": 2}]
SHAPES = (Shape(9, 32, 32), Shape(5, 32, 48))
CROSS = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 12, "text_channels": 8}
FLOW = Flow(shift=1.0)


def new_text(**settings: Any) -> WordText:
    return WordText(**{"channels": 8, "pooled_channels": None, "layers": 1, "heads": 2} | settings)


def new_denoiser(**settings: Any) -> CrossTransformer:
    torch.manual_seed(3)
    denoiser = CrossTransformer(**{"stages": STAGES} | CROSS | settings)
    # A new model predicts zero, and reads no text.
    for layer in (denoiser.out, *(block.text_out for block in denoiser.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return denoiser


def new_module(**settings: Any) -> DenoiserModule:
    defaults = {"denoiser": new_denoiser(), "text": new_text(), "objective": FLOW, "lr": 1e-3, "ema_decay": 0.9}
    return DenoiserModule(**{**defaults, **settings})


def new_vae(seed: int = 0) -> WFVAE:
    torch.manual_seed(seed)
    sizes = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    return WFVAE(**sizes, encoder_blocks=1, decoder_blocks=1, attention=False)


def write_features(
    folder: Path,
    shapes: Sequence[Shape],
    clips: int = 12,
    text: TextIdentity | None = None,
    captions: bool = True,
    **other: Any,
) -> Path:
    """Drawn latents of clips that have these sizes in turn."""
    made = {"vae": "WFVAE", "vae_fingerprint": "x", "time_stride": 4, "space_stride": 8, "latent_channels": 4}
    scaling = {"shift": [0.1] * 4, "scale": [2.0] * 4}
    identity = FeatureIdentity(**made | scaling | other, text=text, dtype="float32")
    draw = torch.Generator().manual_seed(5)
    empty = {"text": torch.ones(1, text.width)} if text else None
    writer = FeatureWriter(folder, identity, clips=clips, origin="drawn", empty=empty)
    for number in writer.todo():
        with writer.shard(number) as shard:
            for index in shard.clips:
                size = shapes[index % len(shapes)]
                shape = identity.latent_shape(size)
                said = [f"clip {index} is shown"] if captions else []
                texts = [torch.randn(3, text.width, generator=draw)] if text and captions else []
                mean = torch.randn(4, 1, 1, 1, generator=draw).expand(shape)  # of one colour
                logvar = torch.randn(shape, generator=draw) - 3
                shard.add(index, Features(f"{index:03d}", size, mean, logvar, said, texts, fps=8.0))
    return folder


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes."""
    return write_features(tmp_path_factory.mktemp("features") / "two", SHAPES)


@pytest.fixture(scope="session")
def one_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "one", SHAPES[:1])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two sizes, and an image."""
    folder, clips = tmp_path_factory.mktemp("shards"), []
    for index in range(9):
        size = (*SHAPES, Shape(1, 32, 32))[index % 3]
        clip = SyntheticClips(9, *size, objects=1, plain=True).read(index, 0)
        record = {"fps": 8.0, "caption": clip["caption"], "kind": "image" if size.frames == 1 else "video"}
        clips.append((f"{index:03d}", clip["video"], record))
    write_rendered(clips, folder, lossless=True)
    return folder


def feature_data(train: Path, batch_size: int = 2, workers: int = 0) -> ClipDataModule:
    val = FeatureClips(train, sample=False)
    return ClipDataModule(FeatureClips(train), val, batch_size=batch_size, workers=workers, val_clips=4)


def bucket_data(shards: Path, workers: int = 0) -> ClipDataModule:
    rule = TokenRule(4, 8, size_stride=16, max_tokens=40)
    val = BucketClips(shards, rule, random_start=False)
    return ClipDataModule(BucketClips(shards, rule), val, batch_size=2, workers=workers, image_ratio=0.25)


class Record(Callback):
    """Remembers what each step read and logged."""

    def __init__(self) -> None:
        self.keys: list[list[list[str]]] = []
        self.logs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.keys.append([part["key"] for part in batch])
        self.logs.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    def losses(self) -> list[float]:
        return [logs["train/loss"] for logs in self.logs]


def fit(
    folder: Path, module: DenoiserModule, data: ClipDataModule, steps: int, resume: Path | None = None, **trainer: Any
) -> Record:
    record = Record()
    lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": [record, BestCheckpoint(folder), LastCheckpoint(folder, 3)],
            "plugins": [AtomicCheckpointIO()],
        }
        | trainer,
    ).fit(module, data, ckpt_path=resume, weights_only=True)
    return record


def draws(sample: int, shape: Sequence[int]) -> tuple[Tensor, bool, Tensor]:
    """The time, whether text is dropped, and the noise of a sample."""
    generator = torch.Generator().manual_seed(stable_seed(0, "train", sample))
    time = FLOW.sample_time(1, [generator])
    dropped = torch.rand((), generator=generator).item() < 0.1
    return time, dropped, torch.randn(tuple(shape), generator=generator)


def test_a_step_is_the_published_loss_and_its_gradient(tmp_path: Path, features: Path) -> None:
    """By hand, in double precision, over two batches of different sizes."""
    module = new_module(accumulate=2, lr=0.0, clipping=NormClipping(1e9), text_dropout=0.1)
    denoiser, text = copy.deepcopy(module.denoiser).double(), copy.deepcopy(module.text).double()
    data = feature_data(features)
    loader = feature_data(features).train_dataloader()
    taken = [*loader, *loader]
    errors, values, seen = [], 0, set()
    first = next(step for step in range(6) if taken[2 * step]["latent"].shape != taken[2 * step + 1]["latent"].shape)
    for batch in taken[2 * first : 2 * first + 2]:
        seen.add(batch["latent"].shape)
        for latent, caption, sample in zip(batch["latent"], batch["caption"], batch["sample"].tolist(), strict=True):
            time, dropped, noise = draws(sample, latent.shape)
            sigma = time.double().item() / 1000
            noisy = (1 - sigma) * latent.double() + sigma * noise.double()
            encoded = text(["" if dropped else caption])
            prediction = denoiser(noisy[None], time, encoded.text, text_mask=encoded.mask)[0]
            errors.append((prediction - (noise.double() - latent.double())).square().sum())
            values += latent.numel()
    assert len(seen) == 2
    loss = torch.stack(errors).sum() / values
    loss.backward()
    weights = [*denoiser.parameters(), *text.parameters()]
    norm = torch.stack([weight.grad.norm() for weight in weights]).norm()

    record = fit(tmp_path, module, data, first + 1)
    assert record.logs[first]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record.logs[first]["train/gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("split", [(2, 2), (1, 4)])
def test_the_split_of_a_step_does_not_matter(tmp_path: Path, one_size: Path, split: tuple[int, int]) -> None:
    whole, parts = new_module(), new_module(accumulate=split[1])
    ours = fit(tmp_path, whole, feature_data(one_size, 4), 4)
    theirs = fit(tmp_path, parts, feature_data(one_size, split[0]), 4)
    assert [[*chain(*step)] for step in theirs.keys] == [[*chain(*step)] for step in ours.keys]
    assert theirs.losses() == pytest.approx(ours.losses(), rel=1e-5)
    assert [logs["train/gradient_norm"] for logs in theirs.logs] == pytest.approx(
        [logs["train/gradient_norm"] for logs in ours.logs], rel=1e-4
    )


def test_one_batch_is_learnt(tmp_path: Path, one_size: Path) -> None:
    data = ClipDataModule(FeatureClips(one_size, sample=False), None, batch_size=2, train_clips=2)
    module = DenoiserModule(
        CrossTransformer(stages=STAGES, **CROSS | {"heads": 4}), new_text(), FLOW, lr=1e-2, betas=(0.9, 0.95)
    )
    fit(tmp_path, module, data, 200, callbacks=[record := Record()], enable_checkpointing=False)
    losses = record.losses()
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


@pytest.mark.parametrize("kind", ["features", "features workers", "videos", "videos workers"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path: Path, features: Path, shards: Path, kind: str) -> None:
    def run(folder: str, steps: int, resume: Path | None = None) -> tuple[DenoiserModule, Record]:
        workers = int("workers" in kind)
        if "features" in kind:
            module = new_module(accumulate=2, muon_lr=1e-3 if workers else None, decay_until=8)
            data = feature_data(features, workers=workers)
        else:
            module = new_module(codec=LatentCodec(new_vae(), 0.0, 1.0), scaling_clips=4, masks=None)
            data = bucket_data(shards, workers)
        module.clipping = AbnormalDrop(deviations=0.5, warmup=2)
        return module, fit(tmp_path / folder, module, data, steps, resume)

    whole, all_of_it = run("whole", 6)
    run("part", 3)
    resumed, rest = run("part", 6, tmp_path / "part" / "last.ckpt")
    assert rest.keys == all_of_it.keys[3:]
    words = resumed.texts.seen.listed()
    assert words == whole.texts.seen.listed()
    assert words
    stored = load_trained_generator(tmp_path / "part" / "last.ckpt", vae=new_vae()) if "videos" in kind else None
    assert stored is None or sorted(stored.text.seen) == words  # type: ignore[attr-defined]
    # Products of matrices may differ in the last bit with where these lie in memory.
    assert rest.losses() == pytest.approx(all_of_it.losses()[3:], rel=1e-6)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert any(key.startswith("ema.model.text.") for key in ours)
    assert not [key for key in ours if "vae" in key or "codec" in key]
    assert ours.keys() == theirs.keys()
    clipping = ours.pop("clipping._extra_state"), theirs.pop("clipping._extra_state")
    assert clipping[0] == {key: pytest.approx(value, rel=1e-5) for key, value in clipping[1].items()}
    assert clipping[0]["norms"] + clipping[0]["dropped"] == 6
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6, msg=key)
    if "videos" in kind:
        assert resumed.codec is not None
        assert whole.codec is not None
        assert resumed.codec.scale == whole.codec.scale != (1.0,) * 4


def test_rates_rise_and_fall_and_muon_takes_the_matrices_of_blocks(tmp_path: Path, one_size: Path) -> None:
    module = new_module(lr=1e-3, muon_lr=2e-3, warmup_steps=1, decay_until=4, text_dropout=0.0)
    adamw, muon = module.configure_optimizers()
    named = {parameter: name for name, parameter in module.model.named_parameters()}
    both = [[named[p] for p in optimizer.param_groups[0]["params"]] for optimizer in (adamw, muon)]
    assert sorted(both[0] + both[1]) == sorted(named.values())
    tables = {"denoiser.blocks.0.table", "denoiser.blocks.1.table"}  # modulation, not a product of matrices
    matrices = [name for parameter, name in named.items() if ".blocks." in name and parameter.ndim == 2]
    assert {"denoiser.blocks.0.qkv.weight", "text.blocks.0.qkv.weight"} <= {*matrices}
    assert sorted(both[1]) == sorted({*matrices} - tables)

    before = copy.deepcopy(module.model.state_dict())
    record = fit(tmp_path, module, feature_data(one_size), 5)
    expected = [0.5, *(0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3)), 0.0]
    assert [logs["train/lr"] for logs in record.logs] == pytest.approx([1e-3 * part for part in expected])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    rates = [state["param_groups"][0]["lr"] for state in checkpoint["optimizer_states"]]
    assert rates == pytest.approx([0.0, 0.0], abs=1e-12)
    name = both[1][0]
    # Steps of Muon have the size of AdamW's: 0.2 of the rate in the mean square.
    moved = (module.model.state_dict()[name] - before[name]).square().mean().sqrt().item()
    assert 0.05 * 2e-3 < moved < 0.2 * 2e-3 * sum(expected) * 1.5


def test_a_dropped_step_moves_nothing_but_the_count(tmp_path: Path, one_size: Path) -> None:
    class Never(AbnormalDrop):
        def limit(self, norm: float) -> float | None:
            return None

    module = new_module(clipping=Never())
    before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    record = fit(tmp_path, module, feature_data(one_size), 3)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert not checkpoint["optimizer_states"][0]["state"]
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert record.logs[-1]["train/dropped_steps"] == 3


def test_a_run_without_finite_losses_ends_in_one_line(tmp_path: Path, one_size: Path) -> None:
    module = new_module(clipping=AdaptiveClipping())
    module.configure_model()
    with torch.no_grad():
        module.denoiser.out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"not finite at step 9 \(and 9 steps before\).*lower module\.lr"):
        fit(tmp_path, module, feature_data(one_size), 20)


def test_the_clip_of_a_loss_that_is_not_finite_is_named_and_listed(tmp_path: Path, one_size: Path) -> None:
    clipping = AdaptiveClipping()
    clipping.patience = 1
    module = new_module(clipping=clipping)
    right = module._clean

    def one_is_wrong(batch: Any, generators: Any) -> Tensor:
        batch["latent"][batch["sample"] == 5] = float("nan")
        return right(batch, generators)

    module._clean = one_is_wrong  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"not finite at step \d.*, in (\S+); its clips are listed in") as raised:
        fit(tmp_path, module, feature_data(one_size), 20)
    (file,) = (tmp_path / "not_finite").iterdir()
    listed = json.loads(file.read_text())
    (wrong,) = [clip for clip in listed["clips"] if clip["sample"] == 5]
    assert listed["suspect"] == [wrong["key"]]
    assert wrong["key"] in str(raised.value)
    assert (wrong["loss"], wrong["finite"]) == ("nan", False)
    assert all(0 <= clip["time"] <= FLOW.time_span and clip["shape"] for clip in listed["clips"])
    assert sum(clip["loss"] != "nan" for clip in listed["clips"]) == len(listed["clips"]) - 1


def test_validation_is_the_same_each_time_and_splits_by_time(tmp_path: Path, one_size: Path) -> None:
    module = new_module(lr=0.0)
    record = fit(tmp_path, module, feature_data(one_size), 7, val_check_interval=3)
    first, second = record.logs[3], record.logs[6]
    names = [f"val/loss_time_{i}" for i in range(4)]
    assert [first[name] for name in ["val/loss", *names]] == [second[name] for name in ["val/loss", *names]]
    assert first["val/loss"] == pytest.approx(sum(first[name] for name in names) / 4, rel=1e-6)
    # This untrained model is about as wrong as its target varies, whatever the time.
    assert len({first[name] for name in names}) == 4
    parts = {key for logs in record.logs for key in logs if key.startswith("train/loss_time")}
    assert parts == {f"train/loss_time_{i}" for i in range(4)}


@pytest.mark.parametrize("objective", [FLOW, Flow(), Velocity(), Epsilon()])
def test_every_objective_trains_in_mixed_precision_and_gives_a_generator(
    tmp_path: Path, objective: Objective, shards: Path
) -> None:
    vae = new_vae()
    vae.origin = str(tmp_path / "gone.ckpt")
    module = new_module(objective=objective, codec=LatentCodec(vae, 0.0, 2.0))
    module.prepare(data := bucket_data(shards))
    fit(tmp_path, module, data, 3, precision="bf16-mixed")
    with pytest.raises(UsageError, match=r"gone\.ckpt, is gone; give vae="):
        load_trained_generator(tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="trained with another VAE"):
        load_trained_generator(tmp_path / "last.ckpt", vae=new_vae(1))
    generator = load_trained_generator(tmp_path / "last.ckpt", vae=new_vae())
    assert (generator.objective, generator.codec.scale, generator.fps) == (objective, (2.0,) * 4, 8.0)
    for key, value in generator.denoiser.state_dict().items():
        assert torch.equal(value, module.ema.model["denoiser"].state_dict()[key])
    video = generator.generate(["a red circle"], 5, 32, 32, seeds=[1])
    assert video.shape == (1, 3, 5, 32, 32)
    with pytest.raises(UsageError, match="leave text out"):
        load_trained_generator(tmp_path / "last.ckpt", vae=new_vae(), text=new_text())
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="holds no denoiser"):
        load_trained_generator(tmp_path / "other.ckpt")


class Frozen(TextEncoder):
    """A text encoder that is not trained."""

    name, trained, channels, pooled_channels, max_tokens = "frozen", False, 8, None, 9

    def __call__(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
        text = torch.stack([torch.full((2, 8), float(len(prompt))) for prompt in prompts])
        return EncodedText(text, torch.ones(len(prompts), 2, dtype=torch.bool))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [2 for _ in prompts]

    def fingerprint(self) -> str:
        return "frozen 1"

    def to(self, device: object) -> "Frozen":
        return self


def test_texts_of_features_or_of_a_frozen_encoder_are_not_in_the_checkpoint(tmp_path: Path, shards: Path) -> None:
    made_by = TextIdentity("frozen", "frozen 1", 8)
    data = feature_data(write_features(tmp_path / "features", SHAPES[:1], text=made_by))
    fit(tmp_path / "a", new_module(text=None, text_dropout=0.5), data, 3)
    fit(tmp_path / "b", new_module(text=Frozen(), codec=LatentCodec(new_vae(), 0.1, 2.0)), bucket_data(shards), 3)
    for run in ("a", "b"):
        checkpoint = torch.load(tmp_path / run / "last.ckpt", weights_only=True)
        assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"model", "ema", "clipping"}
        assert not [key for key in checkpoint["state_dict"] if ".text.places" in key]
        entry = checkpoint["generator"]["text"]
        assert entry["made_by"] == [{"name": "frozen", "fingerprint": "frozen 1", "width": 8}, None]
    path = tmp_path / "b" / "last.ckpt"
    assert load_trained_generator(path, new_vae(), Frozen()).text.name == "frozen"
    with pytest.raises(UsageError, match=r"texts of frozen \(8 wide\)"):
        load_trained_generator(path, new_vae())
    with pytest.raises(UsageError, match="that encoder"):
        load_trained_generator(path, new_vae(), new_text())


def test_given_frames_are_trained_and_shown(tmp_path: Path, shards: Path) -> None:
    denoiser = new_denoiser(frame_channels=[4, 4])
    settings = {"codec": LatentCodec(new_vae(), 0.0, 1.0), "masks": {"first": 1, "text": 1}, "image_text": "still"}
    module = new_module(denoiser=denoiser, **settings)
    data = bucket_data(shards)
    fit(tmp_path, module, data, 3)
    batch = next(iter(data.val_dataloader()))
    shown = module.shown_clips(batch, None, 2)
    assert shown is not None
    frames, height, width = batch["video"].shape[2:]
    assert shown.shape == (2, 3, frames, height, 2 * width)


def test_v12_is_given_frames_in_training_as_it_was_published() -> None:
    codec, draws = LatentCodec(new_vae(), 0.0, 1.0), [[torch.Generator().manual_seed(i) for i in (1, 2)] for _ in "ab"]
    denoiser = new_denoiser(frame_channels=[4, 4], frame_encoding="v12")
    module = new_module(denoiser=denoiser, codec=codec, masks="v12", condition_noise=False)
    video = torch.randint(0, 256, (2, 3, 9, 16, 16), dtype=torch.uint8)
    condition = module._condition({"video": video}, draws[0], noise=False)
    assert condition is not None
    # By hand: the frames are drawn first, then the sample of the posterior, by each sample's own generator.
    given = find_mix("v12").draw_given(to_float(video), draws[1])
    clean = codec.encode(given.video, draws[1])
    assert torch.equal(condition.beside, torch.cat([clean, latent_mask(given.mask, 4, 2, 2, "v12")], dim=1))


def test_half_of_the_clips_without_their_text_may_have_another() -> None:
    read: list[str] = []

    class Reading(Frozen):
        def __call__(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
            read.extend(prompts)
            return super().__call__(prompts, strict)

    texts = TextInput(Reading(), 0.5, dropped_text="clear visuals")
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    dropped = texts.draw_dropped(generators)
    batch: Any = {"caption": ["a clip"] * 400, "video": torch.zeros(400, 3, 1, 1, 1)}
    texts.encode(batch, None, dropped, generators)
    assert {text for text, out in zip(read, dropped.tolist(), strict=True) if not out} == {"a clip"}
    lost = Counter(text for text, out in zip(read, dropped.tolist(), strict=True) if out)
    assert lost.keys() == {"", "clear visuals"}
    assert lost["clear visuals"] / lost.total() == pytest.approx(0.5, abs=0.1)
    # A sample's text does not depend on its batch.
    again = read[7]
    read.clear()
    alone = [torch.Generator().manual_seed(7)]
    texts.encode({"caption": ["a clip"], "video": torch.zeros(1, 3, 1, 1, 1)}, None, texts.draw_dropped(alone), alone)
    assert read == [again]
    with pytest.raises(UsageError, match=r"module\.dropped_text: needs a text encoder"):
        new_module(text=None, text_dropout=0.5, dropped_text="clear visuals")


def prediction(denoiser: Any, text: WordText, conditions: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 3, 4, 4, generator=draw)
    latent = torch.cat([latent, torch.randn(2, conditions, 3, 4, 4, generator=draw)], dim=1)
    encoded = text(["a red circle", "a clip"])
    with torch.no_grad():
        return denoiser(latent, torch.tensor([10.0, 900.0]), encoded.text, encoded.mask, encoded.pooled)


@pytest.mark.parametrize("change", ["sparse", "frames given"])
def test_a_run_begins_where_another_ended(tmp_path: Path, shards: Path, change: str) -> None:
    vae = new_vae()
    first = new_module(codec=LatentCodec(vae, 0.0, 1.0), scaling_clips=4)
    fit(tmp_path, first, bucket_data(shards), 3)
    conditions = 8 if change == "frames given" else 0
    sparse = [{"blocks": 2, "pattern": "skiparse"}]
    new: dict[str, Any] = {"frame_channels": [4, 4]} if conditions else {"stages": sparse}
    torch.manual_seed(9)
    second = DenoiserModule(
        CrossTransformer(**{"stages": STAGES} | CROSS | new),
        new_text(),
        FLOW,
        LatentCodec(new_vae(), 0.0, 1.0),
        scaling_clips=4,
        masks="stage2" if conditions else None,
    )
    second.prepare(bucket_data(shards))
    starts = []
    for seed in (9, 10):  # whatever was drawn before, what is new is drawn by the run's seed
        torch.manual_seed(seed)
        second.start_from(str(tmp_path / "last.ckpt"))
        assert second.start is not None
        starts.append(second.start[0])
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    second.configure_model()
    assert first.codec is not None
    assert second.codec is not None
    assert second.codec.shift == first.codec.shift != (0.0,) * 4
    before = prediction(first.ema.model["denoiser"], first.ema.model["text"])
    for model in (second.model, second.ema.model):
        torch.testing.assert_close(
            prediction(model["denoiser"], model["text"], conditions), before, rtol=1e-5, atol=1e-6
        )


def test_a_dense_joint_transformer_becomes_sparse_with_skips(tmp_path: Path, one_size: Path) -> None:
    sizes = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 16, "text_channels": 8, "pooled_channels": 8}
    dense = {"stages": [{"blocks": 3}], "long_skips": False, "modulation_width": 8}
    sparse = {"stages": [{"blocks": 1, "pattern": "skiparse", "k": k} for k in (1, 2, 1)], "long_skips": True}
    parts = {"text": new_text(pooled_channels=8), "clipping": NormClipping()}
    first = new_module(denoiser=JointTransformer(**sizes | dense), **parts)
    fit(tmp_path, first, feature_data(one_size), 3)
    second = new_module(denoiser=JointTransformer(**sizes | dense | sparse), **parts)
    second.prepare(feature_data(one_size))
    second.start_from(str(tmp_path / "last.ckpt"))
    second.configure_model()
    same = second.denoiser.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in first.ema.model["denoiser"].state_dict().items())
    assert sum("skips" in key for key in same) == 4
    fit(tmp_path / "second", second, feature_data(one_size), 2)


def test_a_run_begins_with_a_folder_of_weights(tmp_path: Path, one_size: Path) -> None:
    torch.manual_seed(8)
    published = CrossTransformer(stages=STAGES, **CROSS)
    save_pretrained(published, tmp_path / "ours")
    module = new_module(denoiser=new_denoiser(position_scale=[1.0, 2.0, 2.0]))
    text = {key: value.clone() for key, value in module.model["text"].state_dict().items()}
    module.prepare(feature_data(one_size))
    module.start_from(str(tmp_path / "ours"))
    module.configure_model()
    for model in (module.model, module.ema.model):
        for key, value in model["denoiser"].state_dict().items():
            assert torch.equal(value, published.state_dict()[key]), key
        assert all(torch.equal(value, text[key]) for key, value in model["text"].state_dict().items())


def test_what_cannot_begin_with_those_weights_is_refused(tmp_path: Path, one_size: Path, features: Path) -> None:
    fit(tmp_path, new_module(), feature_data(one_size), 3)
    path = str(tmp_path / "last.ckpt")

    def start(module: DenoiserModule, data: Path = one_size) -> None:
        module.prepare(feature_data(data))
        module.start_from(path)

    with pytest.raises(UsageError, match=r"denoiser\.heads was 1, is 2; denoiser\.head_dim was 12, is 6"):
        start(new_module(denoiser=new_denoiser(heads=2, head_dim=6)))
    with pytest.raises(UsageError, match="3 blocks, but the model has 2"):
        start(new_module(denoiser=new_denoiser(stages=[{"blocks": 3}])))
    with pytest.raises(UsageError, match="its text encoder has"):
        start(new_module(text=new_text(layers=2)))
    joint = JointTransformer(channels=4, out_channels=4, heads=1, head_dim=16, text_channels=8, pooled_channels=8)
    with pytest.raises(UsageError, match="a CrossTransformer, not a JointTransformer"):
        start(new_module(denoiser=joint, text=new_text(pooled_channels=8)))
    with pytest.raises(UsageError, match="latents of another VAE"):
        start(new_module(), write_features(tmp_path / "v", SHAPES[:1], vae_fingerprint="y"))
    with pytest.raises(UsageError, match="another shift and scale"):
        start(new_module(), write_features(tmp_path / "s", SHAPES[:1], scale=[1.0] * 4))


def test_a_caption_anywhere_counts(tmp_path: Path, one_size: Path, shards: Path) -> None:
    silent = FeatureClips(write_features(tmp_path / "silent", SHAPES[:1], captions=False))
    assert not has_captions(silent)
    assert has_captions(FeatureClips(one_size))
    assert has_captions(BucketClips(shards, TokenRule(4, 8, size_stride=16, max_tokens=40)))
    assert has_captions(SyntheticClips(3, 1, 16, 16))


def refused(match: str, data: ClipDataModule, **settings: Any) -> None:
    with pytest.raises(UsageError, match=match) as error:
        new_module(**settings).prepare(data)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, one_size: Path, shards: Path) -> None:
    data, codec = feature_data(one_size), LatentCodec(new_vae(), 0.0, 1.0)
    wide = {"channels": 8, "out_channels": 8}
    refused(r"4 channels, but denoiser\.channels=8; set", data, denoiser=new_denoiser(**wide))
    refused(r"4 channels, but denoiser\.channels=8; set", data, denoiser=new_denoiser(**wide), codec=codec)
    refused(
        r"out_channels=8: Flow .*predicts 4 channels; .*=4, or .*ddpm_v10", data, denoiser=new_denoiser(out_channels=8)
    )
    learned = Epsilon(learned_variance=True)
    refused(r"out_channels=4: Epsilon with learned_variance .*predicts 8 channels; set .*=8$", data, objective=learned)
    refused(r"tokens 6 wide, but denoiser\.text_channels=8", data, text=new_text(channels=6))
    joint = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 16, "text_channels": 8, "pooled_channels": 4}
    refused(r"no pooled text, but denoiser\.pooled_channels=4", data, denoiser=JointTransformer(**joint))
    refused("there is no VAE", bucket_data(shards))
    refused(r"choose module\.masks", data, denoiser=new_denoiser(frame_channels=[4, 4]))
    refused("has no frame_channels", data, masks="stage2")
    refused(r"set \[4,4\]", data, denoiser=new_denoiser(frame_channels=[4, 2]), codec=codec, masks="text")
    given = {"denoiser": new_denoiser(frame_channels=[4, 4]), "masks": "stage2"}
    refused("features do not allow", data, **given)
    refused("features were made with another VAE", data, codec=codec)
    refused("hold no text; train with text=words", data, text=None)
    refused(
        r"height=32 makes 4 latent pixels, no multiple of denoiser\.patch_size=3",
        data,
        denoiser=new_denoiser(patch_size=3),
    )
    silent = feature_data(write_features(tmp_path / "silent", SHAPES[:1], captions=False))
    refused("have no captions", silent)
    new_module(text_dropout=1.0).prepare(silent)
    other = feature_data(write_features(tmp_path / "text", SHAPES[:1], text=TextIdentity("t5", "t5 abc", 8)))
    refused("encoded by t5 8 wide, not by this frozen", other, text=Frozen())
    mixed = ClipDataModule(data.train_source, silent.val_source, batch_size=2)
    mixed.val_source = other.val_source
    refused("not encoded alike", mixed)
    for name, value in (("text_dropout", 2), ("lr", "fast"), ("accumulate", 0), ("recompute_every", -1)):
        refused(rf"module\.{name}={value}: must ", data, **{name: value})
    refused("needs denoiser=NAME", data, denoiser=None)
    refused("needs objective=NAME", data, objective=None)


TWO_PROCESSES = """
import sys
import osp, torch, lightning
from lightning.pytorch.callbacks import Callback
from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import FeatureClips
from osp.denoiser import CrossTransformer
from osp.devices.mesh import Mesh
from osp.diffusion import Flow
from osp.training.denoiser_module import DenoiserModule

class Show(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.is_global_zero:
            print("loss", repr(trainer.callback_metrics["train/loss"].item()))
    def on_train_end(self, trainer, module):
        mine = torch.cat([value.flatten() for value in module.ema.parameters()])
        gathered = trainer.strategy.all_gather(mine)
        assert all(torch.equal(other, gathered[0]) for other in gathered)
        if trainer.is_global_zero:
            print("val", repr(trainer.callback_metrics["val/loss"].item()))
            print("clips", trainer.callback_metrics["data/val_clips"].item())

sharing = int(sys.argv[2])  # so many processes hold the same clips
if sharing > 1:
    Mesh.of = lambda trainer: Mesh() if trainer is None else Mesh(2, sequence=sharing, rank=trainer.global_rank)

torch.manual_seed(3)
denoiser = CrossTransformer(stages=[{"blocks": 2}], channels=4, out_channels=4, heads=1, head_dim=12, text_channels=8)
text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
module = DenoiserModule(denoiser, text, Flow(shift=1.0), lr=1e-2, accumulate=2)
source = FeatureClips(sys.argv[1])
data = ClipDataModule(source, source, batch_size=1, val_clips=3)
lightning.Trainer(
    accelerator="cpu", devices=2 * sharing, strategy="ddp_fork", max_steps=5, max_epochs=-1, logger=False,
    val_check_interval=5, check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Show()],
).fit(module, data)
"""


@pytest.mark.parametrize("sharing", [1, 2])
def test_two_processes_train_as_one_and_so_do_four_that_share_their_clips(
    tmp_path: Path, one_size: Path, sharing: int
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script), str(one_size), str(sharing)],
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split() for line in done.stdout.splitlines() if line.startswith(("loss", "val", "clips"))]
    assert ["clips", "3.0"] in said
    torch.manual_seed(3)
    denoiser = CrossTransformer(stages=STAGES, **CROSS)
    module = DenoiserModule(denoiser, new_text(), FLOW, lr=1e-2, accumulate=2)
    source = FeatureClips(one_size)
    data = ClipDataModule(source, source, batch_size=2, val_clips=3)
    record = fit(tmp_path, module, data, 5, val_check_interval=5)
    assert len(said) == 5 + 2
    assert [float(value) for name, value in said if name == "loss"] == pytest.approx(record.losses(), rel=1e-5)
    expected = torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"]
    best = expected["BestCheckpoint"]["score"]
    assert [float(value) for name, value in said if name == "val"] == pytest.approx([best])
