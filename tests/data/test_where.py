"""Conditions on clips: a language that runs nothing, and what it lets shards, streams, buckets and features read."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.data.buckets import ShapeList
from osp.data.features.format import FeatureIdentity, Features
from osp.data.features.writer import FeatureWriter
from osp.data.loader import ResumableLoader
from osp.data.media.shape import Shape, Strides
from osp.data.shards.build import write_rendered
from osp.data.sources import BucketClips, FeatureClips, OwnSizeClips, ShardClips
from osp.data.sources.expression import parse
from osp.data.streaming import RemoteShards
from osp.errors import DataError, UsageError

KINDS = {"aesthetic": "number", "motion": "number", "width": "number", "height": "number", "kind": "text"}
KINDS |= {"my score": "number"}
VALUES = {"aesthetic": 5.0, "width": 64.0, "height": 48.0, "kind": "video", "my score": 2.0}  # motion is missing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("aesthetic >= 4.75", True),
        ("aesthetic >= 4.75 and width < 64", False),
        ("not aesthetic >= 4.75 or width == 64", True),
        ("4 < aesthetic <= 5 < width", True),
        ("4 < aesthetic < 5 < width", False),
        ("width / height > 4 / 3 - 1e-9", True),
        ("width - height * 2 + 1 == -31", True),
        ("10 - 2 - 3 == 5 and 8 / 4 / 2 == 1", True),
        ("--width == 64 and -width < - - 1", True),
        ("kind == 'video' and kind != \"image\"", True),
        ("kind in ['image', 'video']", True),
        ("kind not in ['image']", True),
        ("width in [height, 63 + 1]", True),
        ("`my score` == 2", True),
        ("has(aesthetic) and not has(motion)", True),
        ("motion > 0.1", None),
        ("not motion > 0.1", None),
        ("motion > 0.1 and width > 0", None),
        ("motion > 0.1 and width < 0", False),
        ("motion > 0.1 or width > 0", True),
        ("motion > 0.1 or width < 0", None),
        ("not has(motion) or motion > 0.1", True),
        ("motion in [1, 2]", None),
        ("width in [motion, 64]", True),
        ("width in [motion, 63]", None),
        ("0 < motion < 1 < 0", False),
        ("width / (height - 48) > 0", None),
        (".5 < 1. and 1.5e1 == 15", True),
        ("(((aesthetic))) > 4 and (kind == 'video' or (motion > 1))", True),
    ],
)
def test_a_condition_has_this_value(text: str, value: bool | None) -> None:
    assert parse(text, KINDS)(VALUES) is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a name, a number or a text in quotes, found the end"),
        ("aesthetic", "expected a condition such as aesthetic >= 4.75, found a number"),
        ("aesthetic >", r"found the end \(character 12"),
        ("aesthetic > 4 width", r"found width \(character 15"),
        ("aesthetic > 'x'", "expected a number, found a text"),
        ("kind > 3", "expected a text, found a number"),
        ("kind + 1 == 2", "expected a number, found a text"),
        ("(aesthetic > 4) > 3", "a condition cannot be compared"),
        ("aesthetic and kind == 'x'", "expected a condition"),
        ("not aesthetic", "expected a condition"),
        ("aesthetik > 4", r"aesthetik is not known; there are aesthetic, height, kind, motion, my score, width"),
        ("has(4)", "expected a name, found 4"),
        ("aesthetic in []", "expected a name, a number"),
        ("aesthetic in [1", "expected ']', found the end"),
        ("aesthetic > 4; width", r"';' makes no sense there \(character 14"),
        ("aesthetic = 4", "'=' makes no sense there"),
        ("__import__('os').system('x') == 0", "__import__ is not known"),
        ("kind.__class__ == 'x'", "kind.__class__ is not known"),
        ("aesthetic ** 2 > 4", r"expected a name, a number or a text in quotes, found \*"),
        ("aesthetic > 1e999", "too large a number"),
        ("kind == 'video", "makes no sense there"),
        ("(" * 60 + "1 < 2" + ")" * 60, "more than 50 levels"),
        ("not " * 60 + "1 < 2", "more than 50 levels"),
        ("- " * 60 + "1 < 2", "more than 50 levels"),
        ("1 < 2 and " * 500 + "1 < 2", "has 5005 characters; a condition may have 4096"),
        ("kind == '\x1b[2J' \x1b", r"\\x1b"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse(text, KINDS)
    assert str(error.value).startswith("where: ")
    assert str(error.value).isprintable()


def test_long_and_deep_conditions_within_the_limits_are_read() -> None:
    assert parse(" or ".join(["1 > 2"] * 400) + " or 2 > 1", KINDS)(VALUES) is True
    assert parse("(" * 50 + "1 < 2" + ")" * 50, KINDS)(VALUES) is True


# --- what is read -----------------------------------------------------------------------------------------------------


def drawn(number: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    video = torch.full((3, 5, 16, 16), 20 * number, dtype=torch.uint8)
    scores: dict[str, float] = {"aesthetic": 4 + number / 4}
    if number != 5:
        scores["motion"] = number / 100
    return f"clip{number}", video, {"fps": 8.0, "caption": f"number {number}", "scores": scores}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of rising scores in shards of three; the sixth has no motion."""
    folder = tmp_path_factory.mktemp("where") / "shards"
    write_rendered([drawn(number) for number in range(8)], folder, shard_clips=3, lossless=True)
    return folder


WHERE = "aesthetic >= 4.75 and motion > 0.03"
KEPT = ["clip4", "clip6", "clip7"]


def test_a_condition_changes_nothing_but_which_clips_are_read(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        some = ShardClips(shards, 5, 16, 16, where=WHERE)
    every = ShardClips(shards, 5, 16, 16)
    assert [entry.key for entry in some.entries] == KEPT
    assert some.dropped == {
        f"for which where={WHERE} does not hold": 4,
        f"that lack what where={WHERE} needs (motion)": 1,
    }
    assert f"where={WHERE}: 8 clips before, 3 after" in caplog.text
    for index, entry in enumerate(some.entries):
        same = every.read(every.entries.index(entry), 7)
        mine = some.read(index, 7)
        assert torch.equal(mine["video"], same["video"])
        assert (mine["caption"], mine["fps"]) == (same["caption"], same["fps"])


def test_all_sources_of_shards_take_conditions(shards: Path, tmp_path: Path) -> None:
    rule = ShapeList(4, 8, 2, (Shape(5, 16, 16),))
    remote = RemoteShards(str(shards), cache=tmp_path)
    for source in (
        BucketClips(shards, rule, where=WHERE),
        OwnSizeClips(shards, Strides(4, 8), where=WHERE),
        ShardClips(remote, 5, 16, 16, where=WHERE),
    ):
        assert [entry.key for entry in source.entries] == KEPT
        assert sum(source.dropped.values()) == 5


def test_features_take_conditions_on_the_scores_that_they_keep(tmp_path: Path) -> None:
    identity = FeatureIdentity("WFVAE", "x", 4, 8, 2, (0.0, 0.0), (1.0, 1.0), dtype="float32")
    writer = FeatureWriter(tmp_path, identity, clips=3, origin="drawn", empty={})
    with writer.shard(0) as shard:
        for number in shard.clips:
            record = {"scores": {"aesthetic": float(number)}}
            latent = torch.zeros(2, 2, 4, 4)
            shard.add(number, Features(f"clip{number}", Shape(5, 32, 32), latent, latent, [], fps=8.0, record=record))
    clips = FeatureClips(tmp_path, where="aesthetic > 0 and duration < 1 and frames == 5")
    assert [entry.record["original"] for entry in clips.entries] == ["clip1", "clip2"]


def test_unknown_names_and_conditions_that_nothing_meets_are_refused(shards: Path) -> None:
    with pytest.raises(UsageError, match=r"flow is not known; there are aesthetic, caption, .*, motion, .*width"):
        ShardClips(shards, 5, 16, 16, where="flow > 1")
    with pytest.raises(DataError, match="none of its 8 clips passes: 8 for which where=aesthetic > 100 does not hold"):
        ShardClips(shards, 5, 16, 16, where="aesthetic > 100")


def test_a_filtered_run_resumes_exactly_and_another_condition_is_refused(shards: Path) -> None:
    def loader(where: str) -> ResumableLoader:
        return ResumableLoader(ShardClips(shards, 3, 16, 16, where=where), batch_size=2, seed=3)

    def read(loader: ResumableLoader, batches: int) -> list[Any]:
        return [loader._read(loader.batches + number) for number in range(batches)]

    whole = loader(WHERE)
    uninterrupted = read(whole, 6)
    resumed = loader(WHERE)
    resumed.load_state_dict(whole.state_dict() | {"steps": 3, "batches": 3})
    for mine, its in zip(read(resumed, 3), uninterrupted[3:], strict=True):
        assert mine["key"] == its["key"]
        assert torch.equal(mine["video"], its["video"])
    with pytest.raises(UsageError, match="cannot resume, the order of the training clips would change"):
        loader("aesthetic >= 5").load_state_dict(whole.state_dict())
