"""Where a long source is cut: by its packets' timestamps or, where these tell too little, while it is decoded."""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import av

from osp.data.media.container import Timeline

_SLACK = 2e-3  # seconds: 10 s of 30 fps are 300 frames, whatever the rounding of their timestamps (1 ms in Matroska)


@dataclass(frozen=True)
class Piece:
    """A run of frames of a source that is to be a clip."""

    first: int  # index of its first frame, in the order of showing
    frames: int
    start: float  # seconds after the source's first frame
    begin: int  # pts of the first frame
    keyframe: int  # pts of the last clean keyframe up to `begin`
    copied: bool  # whether copying packets can make it


def plan(timeline: Timeline, clip_seconds: float, min_frames: int) -> list[Piece]:
    """Where to cut: pieces of at most `clip_seconds`, one after the other, that miss no frame.

    A cut goes to the last clean keyframe that leaves half of `clip_seconds` at least. Where there is none the piece is
    as long as it may be, and the next one, which then begins without a keyframe, cannot be copied. A rest of less than
    `min_frames` stays with the last piece.
    """
    times = timeline.times
    count = len(times)
    keys = [i for i in range(count) if timeline.keys[i] and timeline.clean[i]]
    cuts = _cuts(timeline, keys, clip_seconds, min_frames)
    pieces = []
    for first, end in pairwise(cuts):
        key = keys[max(bisect.bisect_right(keys, first) - 1, 0)] if keys else 0
        copied = key == first and (end == count or timeline.clean[end])
        pieces.append(Piece(first, end - first, times[first], timeline.pts[first], timeline.pts[key], copied))
    return pieces


def _cuts(timeline: Timeline, keys: Sequence[int], clip_seconds: float, min_frames: int) -> list[int]:
    times = timeline.times
    count = len(times)
    # The same comparison with the frame that would follow the last one tells whether there is a rest.
    ends = [*times, times[-1] + (times[-1] / (count - 1) if count > 1 else 0.0)]
    cuts = [0]
    while True:
        first = cuts[-1]
        last = bisect.bisect_right(ends, times[first] + clip_seconds + _SLACK) - 1
        last = max(last, first + min_frames)
        if count - last < min_frames:
            break
        place = bisect.bisect_right(keys, last) - 1
        nearest = keys[place] if place >= 0 else 0
        if times[nearest] >= times[first] + clip_seconds / 2 and nearest - first >= min_frames:
            last = nearest
        else:
            # Copying the packets up to here is possible only where no later frame lies among them.
            while last > first + min_frames and not timeline.clean[last]:
                last -= 1
        cuts.append(last)
    return [*cuts, count]


def sharing(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in their order, together where one decode serves several: encoded anew, from the same keyframe on."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (piece.copied or run[-1].copied or piece.keyframe != run[-1].keyframe):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


class Shot(NamedTuple):
    """A decoded frame, its time in seconds, and whether it is damaged or leans on one that is."""

    frame: av.VideoFrame
    time: float
    damaged: bool


class Peekable:
    """Frames one by one, of which the next may be looked at before it is taken."""

    def __init__(self, shots: Iterator[Shot]) -> None:
        self._shots = shots
        self._held: Shot | None = None

    def peek(self) -> Shot | None:
        """The next frame, None at the end."""
        if self._held is None:
            self._held = next(self._shots, None)
        return self._held

    def next(self) -> None:
        """Takes the frame that `peek` shows."""
        self._held = None


class Cutter:
    """Cuts decoded frames as `plan` would without any keyframe; holds no more than `min_frames` + 2 of them.

    Args:
        shots: frames whose times go up.
    """

    def __init__(self, shots: Iterator[Shot], clip_seconds: float, min_frames: int) -> None:
        self._shots, self._clip_seconds, self._min_frames = shots, clip_seconds, min_frames
        self._held: deque[Shot] = deque()
        self._count, self._last_time = 0, 0.0
        self._uncut = False  # whether all that is left stays in one piece

    def pieces(self) -> Iterator[tuple[float, Iterator[Shot]]]:
        """(Start in seconds, frames) of each piece; those of its frames that are not taken are passed over."""
        while self._fill(1):
            shots = self._piece()
            yield self._held[0].time, shots
            for _ in shots:
                pass

    def _piece(self) -> Iterator[Shot]:
        limit = self._held[0].time + self._clip_seconds + _SLACK
        yield self._held.popleft()
        length = 1
        while self._fill(2):
            if not self._uncut and self._is_last(length, limit):
                if self._fill(self._min_frames) >= self._min_frames:
                    return
                self._uncut = True
            yield self._held.popleft()
            length += 1

    def _is_last(self, length: int, limit: float) -> bool:
        """Whether the next frame is the last one at which the piece may end, by its time and that of its follower."""
        after_all = self._last_time + self._last_time / max(self._count - 1, 1)
        following = self._held[1].time if len(self._held) > 1 else after_all
        if following <= limit or length < self._min_frames:
            return False
        return self._held[0].time <= limit or length == self._min_frames

    def _fill(self, wanted: int) -> int:
        """Holds so many frames, or all that are left; how many it holds."""
        while len(self._held) < wanted:
            found = next(self._shots, None)
            if found is None:
                break
            self._held.append(found)
            self._count, self._last_time = self._count + 1, found.time
        return len(self._held)
