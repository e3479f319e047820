"""`osp cache` on small shards, with a VAE from a folder."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from osp.conditioning import T5Text
from osp.data.media.video import to_float
from osp.data.shards.build import write_rendered
from osp.data.sources import FeatureClips, ShardClips, SyntheticClips
from osp.vae import WFVAE, LatentCodec
from osp.weights import load_pretrained
from osp.weights.pretrained import save_pretrained

Osp = Callable[..., tuple[int, str, str]]
CLIPS = 7
DTYPE = "dtype was float16, is float32. Set this back, or use another folder"
SIZE = ["clip.frames=9", "clip.height=32", "clip.width=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of clips, and two VAEs of 8x8x8 compression, whose scaling nobody has published."""
    folder = tmp_path_factory.mktemp("world")
    drawn = SyntheticClips(CLIPS, frames=9, height=32, width=32, objects=1, plain=True)
    clips = [drawn.read(index, 0) for index in range(CLIPS)]
    rendered = [(f"{i:03d}", clip["video"], {"fps": 8.0, "caption": clip["caption"]}) for i, clip in enumerate(clips)]
    write_rendered(rendered, folder / "shards", lossless=True)
    for name in ("vae", "other"):
        torch.manual_seed(len(name))
        small = {"base_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
        flow = {"encoder_flow_channels": 4, "decoder_flow_channels": 4}
        save_pretrained(WFVAE(latent_channels=4, level1="3d", **small, **flow), folder / name)
    return folder


@pytest.fixture
def cache(world: Path, osp: Osp) -> "Cache":
    return Cache(world, osp)


class Cache:
    """Runs `osp cache`."""

    def __init__(self, world: Path, osp: Osp) -> None:
        self.settings = ["vae=pretrained", f"path={world / 'vae'}", f"input={world / 'shards'}"]
        self.settings += ["shard_clips=3", "batch_size=2", "device=cpu"]
        self.osp = osp

    def call(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        size = [] if any(argument.startswith("buckets=") for argument in arguments) else SIZE  # which buckets give
        return self.osp("cache", *self.settings, *size, *arguments)

    def __call__(self, *arguments: str) -> dict[str, Any]:
        code, out, said = self.call(*arguments)
        assert code == 0, said
        return json.loads(out.splitlines()[-1])


def content(folder: Path) -> dict[str, bytes]:
    """The files of the features."""
    names = [path for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".jsonl", ".json", ".safetensors")]
    return {path.name: path.read_bytes() for path in names}


def test_features_by_one_process_by_parts_and_by_several(world: Path, cache: Cache) -> None:
    result = cache("output=whole")
    counts = {"complete": True, "clips": CLIPS, "shards": 3, "skipped": 0}
    assert {name: result[name] for name in counts} == counts
    assert result["output"] == str(Path("whole").absolute())
    assert result["clips_per_second"] > 0
    features = FeatureClips("whole", sample=False)
    assert features.vae_origin == str(world / "vae")
    assert [*features.made_with.shift] == result["scaling"]["shift"]
    vae = load_pretrained(world / "vae")
    assert isinstance(vae, WFVAE)
    codec = LatentCodec(vae, **result["scaling"])
    source = ShardClips(world / "shards", 9, 32, 32, random_start=False)
    latents = []
    for index in range(CLIPS):
        clip, read = source.read(index, 0), features.read(index, 0)
        torch.testing.assert_close(read["latent"], codec.encode(to_float(clip["video"])[None])[0], rtol=2e-3, atol=5e-3)
        assert (read["caption"], read["fps"]) == (clip["caption"], 8.0)
        latents.append(FeatureClips("whole").read(index, 0)["latent"].flatten(1))
    assert torch.cat(latents, dim=1).mean(dim=1).abs().max() < 0.2  # it was measured
    assert torch.cat(latents, dim=1).std(dim=1).tolist() == pytest.approx([1.0] * 4, abs=0.2)

    # The one that begins measures, whichever it is.
    assert cache("output=parts", "parts=2", "part=1")["complete"] is False
    assert cache("output=parts", "parts=2", "part=0")["complete"] is True
    assert content(Path("parts")) == content(Path("whole"))

    again = cache("output=whole")
    assert again["clips_per_second"] is None
    assert content(Path("parts")) == content(Path("whole"))


def test_several_processes_share_the_work(cache: Cache) -> None:
    code, out, said = cache.call("output=several", "processes=2", "workers=1")
    assert code == 0, said
    result = json.loads(out.splitlines()[-1])
    assert (result["complete"], result["clips"], result["shards"]) == (True, CLIPS, 3)
    assert set(re.findall(r"part (\d) of 2", said)) == {"0", "1"}
    assert len(re.findall("measuring the scale", said)) == 1
    assert "shards of" not in said
    # Torch has fewer threads there than in one process, and sums may differ in their last bits.
    scaling = [f"latent.{name}={json.dumps(values).replace(' ', '')}" for name, values in result["scaling"].items()]
    cache("output=whole", *scaling)
    for index in range(CLIPS):
        one, other = (FeatureClips(name, sample=False).read(index, 0) for name in ("whole", "several"))
        torch.testing.assert_close(one["latent"], other["latent"], rtol=1e-2, atol=1e-2)
    code, _, said = cache.call("output=several", "processes=2", "dtype=float32")
    assert (code, said) == (2, f"osp cache: {Path('several').absolute()}: was begun otherwise: " + DTYPE)


def test_devices_share_the_tiles_of_each_batch(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = ["tiling={size:24,overlap:8}", "latent.scale=0.5", "dtype=float32"]
    cache("output=alone", *tiles)
    result = cache("output=together", "devices=2", *tiles)
    assert (result["complete"], result["clips"], result["shards"]) == (True, CLIPS, 3)
    whole = cache("output=whole", *tiles[1:])
    assert whole["clips"] == CLIPS
    for index in range(CLIPS):
        one, other, untiled = (
            FeatureClips(name, sample=False).read(index, 0) for name in ("alone", "together", "whole")
        )
        torch.testing.assert_close(one["latent"], other["latent"], rtol=1e-4, atol=1e-4)
        assert (one["latent"] - untiled["latent"]).abs().max() > 1e-3
    code, _, said = cache.call("output=together", *tiles[1:])
    assert (code, "precision=32-true tiles=24/8, is " in said) == (2, True), said


def test_a_folder_goes_on_only_as_it_was_begun(world: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osp.devices.precision.fast_precision", lambda device: "16-mixed")
    cache("output=a", "parts=2", "latent.scale=0.5")
    for change, told in (
        (["dtype=bfloat16"], "dtype was float16, is bfloat16"),
        (["latent.scale=0.25"], r"scale was \[0\.5, .*is \[0\.25"),
        ([f"path={world / 'other'}"], f"made with another VAE .WFVAE of {world / 'vae'}. than {world / 'other'}"),
        (["clip.frames=5"], "the source was shards 9x32x32 .*, is shards 5x32x32"),
        (["precision=bf16-mixed"], "precision=32-true, is .*precision=bf16-mixed"),
        (["precision=auto"], "precision=32-true, is .*precision=16-mixed"),
        (["shard_clips=4"], "shard_clips was 3, is 4"),
    ):
        code, _, said = cache.call("output=a", *change)
        assert (code, bool(re.search(told, said)), len(said.splitlines())) == (2, True, 1), said
    result = cache("output=a")  # the scale is the folder's, also where it is not said again
    assert (result["complete"], result["scaling"]["scale"]) == (True, [0.5] * 4)

    val = cache("output=val", "scaling_from=a", "clip.frames=5")
    assert val["scaling"] == result["scaling"]
    code, _, said = cache.call("output=b", "scaling_from=a", f"path={world / 'other'}")
    assert (code, "a: its features were made with another VAE" in said) == (2, True)
    code, _, said = cache.call("output=b", "scaling_from=a", "latent.scale=1")
    assert (code, "leave out latent.shift" in said) == (2, True)
    code, _, said = cache.call("output=b", "scaling_from=none")
    assert (code, "none: no folder of features" in said) == (1, True)
    assert not list(Path("b").glob("*.tar"))
    again = cache("output=c", "buckets=shapes", "buckets.shapes=[[9,32,32],[1,16,16]]", "latent.scale=[1,2,3,4]")
    assert (again["clips"], again["scaling"]["scale"]) == (CLIPS, [1.0, 2.0, 3.0, 4.0])


def test_frozen_text_goes_into_the_features(cache: Cache) -> None:
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 384}
    transformers.MT5EncoderModel(transformers.MT5Config(**shape)).save_pretrained("mt5")
    transformers.ByT5Tokenizer().save_pretrained("mt5")
    encoder = ["text=mt5_v13", f"text.path={Path('mt5').absolute()}", "text.channels=32"]
    cache("output=features", *encoder)
    features = FeatureClips("features", sample=False)
    text = T5Text("mt5", channels=32, cleaning="once")
    assert features.made_with.text is not None
    assert features.made_with.text.fingerprint == text.fingerprint()
    clip = features.read(3, 0)
    torch.testing.assert_close(clip["text"].float(), text([clip["caption"]]).text[0].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(features.empty["text"].float(), text([""]).text[0].float(), rtol=0.02, atol=0.02)
    assert cache.call("output=features")[0] == 2
    assert cache("output=words", "text=words")["clips"] == CLIPS
    assert FeatureClips("words").made_with.text is None


WRONG = [
    (["part=2", "parts=2"], 2, "part=2, parts=2: the parts are 0 to 1"),
    (["parts=0"], 2, "parts=0: must be a"),
    (["processes=none"], 2, "processes=none: must be a"),
    (["processes=2", "devices=2"], 2, "processes=2 devices=2: is one too many"),
    (["tiling=256"], 2, "tiling=256: must be null or like {size: 256, overlap: 64}"),
    (["tiling={{size:20,overlap:8}}"], 2, "tiling: size=20: must be a multiple of 8"),
    (["clip.height=36"], 2, "height=36: must be a multiple of 8"),
    (["clip.frames=99"], 1, "none of its 7 clips is long enough"),
    (["path=null"], 2, "give checkpoint=FILE"),
    (["vae=wfvae_tiny", "path=null"], 2, "random weights"),
    (["precision=8-true"], 2, "precision=8-true"),
    (["dtype=float8"], 2, "dtype=float8"),
    (["posterior=mode"], 2, "posterior=mode"),
    (["latent.scale=[1,2]"], 2, "latent.scale has 2 values; 4 are needed"),
    (["buckets=shapes", "buckets.shapes=[[5,32,32]]"], 2, "no shape can be 5x32x32"),
    (["buckets=tokens"], 2, "buckets.max_tokens"),
    (["buckets=tokens", "buckets.max_tokens=1", "buckets.min_tokens=1"], 1, "no bucket has a clip"),
    (["output={world}/shards"], 1, "not an index of features"),
    (["input={world}/none"], 1, "none: no such folder"),
    (["device=tpu"], 2, "device=tpu: is not known"),
    (["text=mt5_v13", "text.path={world}/none"], 2, "none: no such folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_a_wrong_command_is_told_in_one_line(
    arguments: list[str], code: int, message: str, world: Path, cache: Cache
) -> None:
    before = sorted(os.listdir(world / "shards"))
    got, out, said = cache.call("output=new", *(part.format(world=world) for part in arguments))
    assert got == code, said
    assert re.search(message, said), said
    assert "\n" not in said
    assert not out
    assert not list(Path("new").glob("*.tar"))
    assert {*before, "cache.log"} >= set(os.listdir(world / "shards"))
