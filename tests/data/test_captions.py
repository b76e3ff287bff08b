"""Captions name the object, and its colour as people would."""

import numpy as np
import pytest

from pbe.data.captions import WRITTEN_MAX, caption, colour_name, written_caption

# muted, as things are: many of them a palette of pure colours would call grey or black
SEEN = {
    "grass": ((90, 110, 50), "green"),
    "sky": ((135, 180, 220), "blue"),
    "wood": ((150, 110, 70), "brown"),
    "golden fur": ((190, 150, 100), "brown"),
    "brick": ((160, 60, 45), "red"),
    "asphalt": ((110, 112, 115), "grey"),
    "coal": ((18, 17, 20), "black"),
    "snow": ((245, 247, 250), "white"),
    "banana": ((230, 200, 60), "yellow"),
    "carrot": ((235, 120, 30), "orange"),
    "aubergine": ((70, 25, 80), "purple"),
    "navy": ((10, 10, 80), "blue"),
    "blossom": ((245, 180, 210), "pink"),
}


@pytest.mark.parametrize("thing", SEEN)
def test_a_thing_has_the_colour_that_people_name(thing: str) -> None:
    rgb, name = SEEN[thing]
    assert colour_name(np.full((20, 30, 3), rgb, np.uint8)) == name


def test_the_object_counts_not_the_corners_and_most_of_it_not_its_mean() -> None:
    """The mean of red and blue would be purple."""
    picture = np.full((60, 40, 3), (30, 170, 40), np.uint8)  # green, 21 % of it outside the ellipse
    ys, xs = np.mgrid[:60, :40]
    inside = ((ys - 29.5) / 30) ** 2 + ((xs - 19.5) / 20) ** 2 <= 1
    picture[inside & (ys < 36)] = (229, 0, 0)
    picture[inside & (ys >= 36)] = (3, 67, 223)
    assert colour_name(picture) == "red"
    assert caption("Car", "label_colour", picture) == "a photo of a red car"
    assert caption("Car", "label") == "a photo of a car"


def test_what_the_data_say_goes_before_the_label() -> None:
    assert caption("Car", "caption", written="my old Beetle") == "my old Beetle"
    assert caption("Car", "caption") == "a photo of a car"
    assert caption("Car", "label", written="my old Beetle") == "a photo of a car"


def test_a_written_caption_is_one_line_that_prints() -> None:
    assert written_caption("  a car\nin\u00a0the  rain ") == "a car in the rain"
    assert written_caption(" \n") is None
    joined = "\u0645\u06cc\u200c\u0631\u0648\u0645 \U0001f468\u200d\U0001f4bb"
    assert written_caption(joined) == joined
    assert written_caption("x" * WRITTEN_MAX) == "x" * WRITTEN_MAX
    with pytest.raises(ValueError, match=f"has {WRITTEN_MAX + 1} characters, at most {WRITTEN_MAX}"):
        written_caption("x" * (WRITTEN_MAX + 1))
    for hidden in ("\x1b[2J", "a\u202eb", "a\ud800"):
        with pytest.raises(ValueError, match="characters that do not print"):
            written_caption(hidden)
