"""The rule by which one face is followed, and what is filled in."""

from __future__ import annotations

import numpy as np

from m2f2cli.data.faces import Face
from m2f2cli.data.prepare.tracking import MAX_FILLED, Track
from m2f2cli.data.video import Frame

BLANK = np.zeros((1, 1, 3), np.uint8)


def face(x, y=0, side=40):
    return Face((x, y, x + side, y + side), 1.0, (1000, 500))


def follow(*steps, every=0.1):
    """Feed lists of faces; return (frame, left edge, interpolated) of what was settled."""
    track, found = Track(), []
    for index, faces in enumerate(steps):
        for placed in track.follow(Frame(index, index * every, BLANK), list(faces)):
            found.append((placed.frame.index, placed.box[0], placed.interpolated))
    return found


def test_the_largest_face_begins_and_the_nearest_goes_on():
    big, small = face(100, side=60), face(300)
    assert follow([big, small], [face(310), face(110)]) == [(0, 100, False), (1, 110, False)]
    # The other grows past it; two that overlap the last box: the nearer one.
    assert follow([face(100)], [face(400, side=90), face(104)])[1] == (1, 104, False)
    assert follow([face(100)], [face(130), face(90)])[1] == (1, 90, False)


def test_a_gap_is_filled_along_a_straight_line():
    assert follow([face(100)], [], [], [], [face(120)]) == [
        (0, 100, False),
        (1, 105, True),
        (2, 110, True),
        (3, 115, True),
        (4, 120, False),
    ]


def test_a_long_gap_is_left_out():
    gap = [[]] * 4
    assert follow([face(100)], *gap, [face(120)], every=0.3) == [(0, 100, False), (5, 120, False)]
    many = [[]] * (MAX_FILLED + 1)
    found = follow([face(100)], *many, [face(120)], [], [face(122)], every=0.01)
    end = MAX_FILLED + 2
    assert found == [
        (0, 100, False),
        (end, 120, False),
        (end + 1, 121, True),
        (end + 2, 122, False),
    ]


def test_a_face_elsewhere_is_not_believed_at_once():
    steps = [[face(100)], [face(700)], [face(104)]]
    assert follow(*steps) == [(0, 100, False), (1, 102, True), (2, 104, False)]
    # Frames a long time apart: nothing says that it is another one.
    assert follow(*steps, every=2) == [(0, 100, False), (1, 700, False), (2, 104, False)]
    # After a cut the new face is taken within the limit.
    found = follow([face(100)], *[[face(700)]] * 20)
    assert [index for index, _, _ in found] == [0, *range(11, 21)]


def test_nothing_before_the_first_face_and_after_the_last():
    assert follow([], [face(10)], [], []) == [(1, 10, False)]
    assert follow([], []) == []
