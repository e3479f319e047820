"""`VideoInfo`: what a file of a video or image holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoInfo:
    """Contents of a file; width and height are as displayed. An image has one frame, fps 0 and duration 0."""

    frames: int
    fps: float  # the mean rate, where it varies
    width: int
    height: int
    duration: float  # seconds
    codec: str
    kind: str  # "video" or "image"
