"""Videos against prompts: all right for rendered clips, chance for other clips' prompts, and honest intervals."""

from collections.abc import Iterator

import pytest
import torch

from osp.data.procedural.oracle import UNKNOWN, Reading
from osp.data.sources import SyntheticClips
from osp.errors import UsageError
from osp.evaluation.prompt_accuracy import CHANCE, Judgement, Rate, accuracy, judge, shuffled_accuracy


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judgements() -> list[Judgement]:
    clips = SyntheticClips(160, 9, 48, 48, objects=1, plain=True, seed=5)
    read = (clips.read(index, 0) for index in range(len(clips)))
    return [judge(clip["video"], clip["caption"]) for clip in read]


def test_rendered_clips_are_all_right(judgements: list[Judgement]) -> None:
    rates = accuracy(judgements)
    assert list(rates) == ["all", "colour", "shape", "motion"]
    assert {part: (rate.right, rate.count) for part, rate in rates.items()} == dict.fromkeys(rates, (160, 160))


def test_other_clips_prompts_are_right_by_chance_only(judgements: list[Judgement]) -> None:
    assert CHANCE == {"all": 1 / 560, "colour": 1 / 10, "shape": 1 / 7, "motion": 1 / 8}
    measured = shuffled_accuracy(judgements)
    for part, chance in CHANCE.items():
        assert measured[part] == pytest.approx(chance, rel=0.02)
    # A clip's own prompt is not among the others.
    two = [Judgement("a", Reading("red", "star", "up"), Reading("red", "star", "up"))] * 2
    assert shuffled_accuracy(two)["all"] == 1
    other = Judgement("b", Reading("blue", "ring", "up"), Reading("blue", "ring", "up"))
    assert shuffled_accuracy([two[0], other]) == {"all": 0, "colour": 0, "shape": 0, "motion": 1}


def test_the_parts_are_judged_apart() -> None:
    asked = Reading("red", "star", "up")
    seen = [asked, Reading("red", "ring", "up"), Reading("blue", None, "up"), UNKNOWN]
    rates = accuracy([Judgement("", asked, reading) for reading in seen])
    assert {part: rate.right for part, rate in rates.items()} == {"all": 1, "colour": 2, "shape": 1, "motion": 3}


def test_an_empty_video_shows_nothing() -> None:
    blank = judge(torch.zeros(3, 5, 32, 32), "a red star moves up")
    assert blank.seen == UNKNOWN
    assert not any(blank.right().values())
    with pytest.raises(UsageError, match="names no shape"):
        judge(torch.zeros(3, 5, 32, 32), "a cat")


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # worked out from Wilson's formula with z = 1.959964
    [(8, 10, 0.490162, 0.943318), (0, 20, 0.0, 0.1611252), (64, 64, 0.9433759, 1.0), (1, 560, 0.0003153, 0.0100448)],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    rate = Rate(right, count)
    assert rate.interval == pytest.approx((low, high), abs=2e-6)
    assert rate.plain()["rate"] == right / count
    assert rate.interval[0] <= rate.rate <= rate.interval[1]
