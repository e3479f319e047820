"""Captions are read back as what they say, and prompts that say less are refused."""

import pytest

from osp.data.procedural.scene import SceneObject, caption, read_caption, scene_for
from osp.errors import UsageError


def test_reading_a_caption_inverts_writing_it() -> None:
    for index in range(4000):
        scene = scene_for(7, index, objects=1)
        truth, said = scene.objects[0], caption(scene)
        seen = read_caption(said)
        assert (seen.colour, seen.shape, seen.motion) == (truth.colour, truth.shape, truth.motion), said
        # Some wordings leave these out.
        assert seen.size in (truth.size, "medium"), said
        assert seen.texture in (truth.texture, "plain"), said


def test_a_prompt_in_other_words_is_read_if_it_names_all() -> None:
    wanted = SceneObject("star", "red", "right", size="small", texture="striped")
    assert read_caption("On a grey background,  A SMALL striped red STAR slowly slides right.") == wanted


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red cat moves up", "'a red cat moves up' names no shape that is known; use one of circle, "),
        ("a grey circle moves up", "names no colour that is known before 'circle'; use one of red, "),
        ("a circle on a red background moves up", "names no colour"),
        ("a red circle flies", "names no motion that is known; use one of: moves to the left, "),
        ("a red circle grows and moves up", r"names 2 motions \(up, grow\), not one"),
        ("a red circle grows and a blue ring grows", r"names 2 shapes \(circle, ring\), not one"),
        ("", "'' names no shape"),
    ],
)
def test_a_prompt_that_does_not_say_what_to_look_for_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_caption(prompt)
