"""The contact sheet: which frames it shows, that they arrive unchanged, and that text stays inside."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from osp.report.contact_sheet import ERROR, ERROR_GAIN, SheetClip, draw_contact_sheet, error_map

INPUT, OUTPUT = (10, 200, 30), (200, 20, 160)


def plain(colour: tuple[int, int, int], frames: int, height: int, width: int) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, frames, height, width)


def clip(frames: int = 9, height: int = 64, width: int = 64, key: str = "000001-clip") -> SheetClip:
    video, reconstruction = (plain(colour, frames, height, width) for colour in (INPUT, OUTPUT))
    return SheetClip.compare(key, "PSNR 30.00 dB   lpips_random_trunk 0.1000", video, reconstruction)


def pixels_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_frames_are_evenly_spaced_from_first_to_last() -> None:
    assert clip(frames=26).frame_numbers == (0, 5, 10, 15, 20, 25)
    assert clip(frames=1).frame_numbers == (0,)
    video = torch.arange(26, dtype=torch.uint8).view(1, 26, 1, 1).expand(3, 26, 2, 2)
    compared, shown = SheetClip.compare("k", "", video, video + 100), SheetClip.show("k", "", video)
    assert compared.frame_numbers == shown.frame_numbers
    assert list(compared.lines) == ["input", "output", ERROR]
    for line, offset in ((compared.lines["input"], 0), (compared.lines["output"], 100), (shown.lines[""], 0)):
        assert line[:, 0, 0, 0].tolist() == [offset + number for number in compared.frame_numbers]


def test_small_frames_are_enlarged_by_a_whole_factor_and_large_ones_shrunk() -> None:
    assert clip(height=64, width=64).cell == (192, 192)
    assert clip(height=16, width=24).cell == (128, 192)
    assert clip(height=100, width=150).cell == (100, 150)
    assert clip(height=480, width=854).cell == (108, 192)


def test_every_frame_is_on_the_sheet() -> None:
    sheet = draw_contact_sheet([clip()] * 3, "a model", ["PSNR 30.00 dB"])
    assert pixels_of(sheet, INPUT) == pixels_of(sheet, OUTPUT) == 3 * 6 * 192 * 192
    wide = draw_contact_sheet([clip()] * 5, "a model")
    assert pixels_of(wide, INPUT) == 5 * 6 * 192 * 192
    assert wide.width > 1.8 * sheet.width  # two columns
    assert wide.height < 1.2 * sheet.height


def test_clips_of_different_sizes_share_a_sheet() -> None:
    clips = [clip(height=64, width=64), clip(frames=1, height=360, width=200), clip(height=8, width=16)] * 2
    sheet = draw_contact_sheet(clips, "a model")
    expected = 2 * (6 * 192 * 192 + 192 * 107 + 6 * 96 * 192)
    assert pixels_of(sheet, INPUT) == expected


def test_long_text_is_cut_and_stays_inside() -> None:
    sheet = draw_contact_sheet([clip(key="a-long-key-" * 40)], "a long name " * 40, ["metric 1.0000"] * 60)
    margin = np.asarray(sheet)[:, -20:]
    assert (margin == margin[0, 0]).all()
    assert pixels_of(sheet, INPUT) == 6 * 192 * 192


def test_error_is_amplified_and_saturates() -> None:
    video = torch.zeros(3, 1, 1, 4, dtype=torch.uint8)
    reconstruction = torch.tensor([0, 255 // ERROR_GAIN, 200, 10], dtype=torch.uint8).expand(3, 1, 1, 4)
    colours = error_map(video, reconstruction)[0, 0]
    assert colours[0].tolist() == [0, 0, 4]
    assert colours[1].tolist() == colours[2].tolist() == [252, 255, 164]
    brightness = colours.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert brightness[0] < brightness[3] < brightness[1]


def test_single_clips_are_marked_right_or_wrong() -> None:
    shown = [
        SheetClip.show("a red star moves up", "read as a red star, up", plain(INPUT, 9, 64, 64), right)
        for right in (True, False, None)
    ]
    assert shown[0].size[0] < clip().size[0]
    counts = []
    for one in shown:
        sheet = draw_contact_sheet([one], "a model", ["prompt accuracy 50.0 %"])
        assert pixels_of(sheet, INPUT) == 6 * 192 * 192
        counts.append([pixels_of(sheet, colour) for colour in ((30, 140, 60), (200, 40, 40))])
    assert counts[0][0] > 200
    assert counts[1][1] > 200
    assert counts[0][1] == counts[1][0] == sum(counts[2]) == 0
