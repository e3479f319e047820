"""Published annotations, other captions and conditions from the command line, up to a run that goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osp.data.media.video import encode_video
from osp.data.shards.build import write_rendered

Osp = Callable[..., tuple[int, str, str]]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A list of one annotation: two clips of one video, and one record without a caption."""
    (tmp_path / "media").mkdir()
    video = torch.arange(20, dtype=torch.uint8).mul(10).view(1, 20, 1, 1).expand(3, -1, 32, 48).contiguous()
    (tmp_path / "media" / "a.mp4").write_bytes(encode_video(video, 24.0, threads=1))
    row = {"path": "a.mp4", "cap": "grey", "resolution": {"height": 32, "width": 48}, "num_frames": 10, "aes": 5.0}
    rows = [row, row | {"cut": [10], "crop": [0, 32, 0, 32], "aes": 3.0}, row | {"cap": None}]
    (tmp_path / "anno.json").write_text(json.dumps(rows))
    (tmp_path / "data.txt").write_text("media,anno.json\n\n")
    return tmp_path / "data.txt"


def test_published_lists_become_shards_which_get_other_captions(published: Path, tmp_path: Path, osp: Osp) -> None:
    code, out, said = osp("shards", "annotations=data.txt", "output=s", "workers=0")
    result = json.loads(out.splitlines()[-1])
    assert (code, result["clips"], result["left_out"]) == (0, 2, {"records without a caption": 1})
    assert "data.txt: 2 clips, all with captions; left out: 1 records without a caption" in said
    (tmp_path / "new.jsonl").write_text('{"file": "media/a.mp4", "caption": "getting brighter"}\n')
    code, out, _ = osp("shards", "input=s", "captions=new.jsonl", "output=t")
    result = json.loads(out.splitlines()[-1])
    assert (code, result["clips"], result["changed"], result["skipped"]) == (0, 2, 2, [])
    assert (tmp_path / "t" / "shard-000000.jsonl").read_text().count("getting brighter") == 2


def test_pickles_and_mistakes_are_one_line(published: Path, tmp_path: Path, osp: Osp) -> None:
    (tmp_path / "anno.pkl").write_bytes(b"\x80\x04.")
    published.write_text("media,anno.pkl\n")
    code, _, said = osp("shards", "annotations=data.txt", "output=s")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "data.txt:1: " in said
    assert "anno.pkl: is a pickle, and reading it would run code" in said
    code, _, said = osp("shards", "annotations=data.txt", "captions=x.jsonl", "output=s")
    assert (code, "captions" in said, "input=DIR and no annotations" in said) == (2, True, True)
    code, _, said = osp("shards", "annotations=gone.txt", "output=s")
    assert (code, said.endswith("gone.txt: no such file or folder")) == (2, True)


def test_a_run_reads_what_meets_its_condition_and_goes_on_with_no_other(tmp_path: Path, osp: Osp) -> None:
    clips = [
        (f"clip{n}", torch.full((3, 5, 16, 16), 40 * n, dtype=torch.uint8), {"fps": 8.0, "scores": {"aesthetic": n}})
        for n in range(6)
    ]
    write_rendered(clips, tmp_path / "s", lossless=True)
    run = (
        *("train", "experiment=wfvae_tiny", "data=shards", "data.train.path=s", "output=run", "data.val_clips=1"),
        *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
        *("clip.frames=5", "clip.height=16", "clip.width=16", "data.batch_size=1", "data.workers=0", "trainer=cpu"),
        *("module.decay_until=null", "trainer.val_check_interval=1"),
    )
    code, _, said = osp(*run, "data.train.where=aesthetic > 7", "trainer.max_steps=1")
    assert (code, "none of its 6 clips passes" in said) == (1, True)
    code, _, said = osp(*run, "data.train.where=aesthetik > 1", "trainer.max_steps=1")
    assert (code, "aesthetik is not known; there are aesthetic, caption" in said) == (2, True)
    code, _, said = osp(*run, "data.train.where=aesthetic >= 3", "trainer.max_steps=1")
    assert code == 0, said
    assert "where=aesthetic >= 3: 6 clips before, 3 after" in said
    code, _, said = osp(*run, "data.train.where=aesthetic >= 3", "trainer.max_steps=2")
    assert code == 0, said
    code, _, said = osp(*run, "data.train.where=aesthetic >= 4", "trainer.max_steps=3")
    assert (code, "holds a run with data.train.where=aesthetic >= 3, not aesthetic >= 4" in said) == (2, True), said
