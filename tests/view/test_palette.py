"""The report's colours: told apart by every eye, and text on them readable."""

import re
from importlib.resources import files
from itertools import combinations

import pytest

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, on linear RGB.
SIGHT = {
    "usual": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))

Triple = tuple[float, ...]


def times(matrix: tuple[Triple, ...], vector: Triple) -> Triple:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def linear(colour: str) -> Triple:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)


def lab(rgb: Triple) -> Triple:
    def f(t: float) -> float:
        return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116

    scaled = zip(times(XYZ, rgb), (0.9505, 1.0, 1.089), strict=True)
    x, y, z = (f(max(0.0, value) / white) for value, white in scaled)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def palettes() -> list[dict[str, str]]:
    style = files("meshwright.view").joinpath("report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks]


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_parts_of_a_bar_look_different_to_every_eye(theme: int, sight: str) -> None:
    colours = palettes()[theme]
    names = ("blue", "vermilion", "teal", "gold", "pink", "grey")
    seen = {name: lab(times(SIGHT[sight], linear(colours[name]))) for name in names}
    # Parts that touch in a bar; pink and grey are the small ones at its end.
    for one, other in combinations(("blue", "vermilion", "teal", "gold"), 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert distance > 20, (one, other, distance)
    for one, other in combinations(names, 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
        assert distance > 12, (one, other, distance)


def luminance(colour: str) -> float:
    return times(XYZ, linear(colour))[1]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "paper", "least"),
    [
        ("ink", "paper", 7),
        ("soft", "paper", 4.5),
        ("soft", "raised", 4.5),
        ("good", "good-paper", 4.5),
        ("bad", "bad-paper", 4.5),
        ("on-part", "blue", 4.5),
        ("on-part", "vermilion", 3),
        ("on-part", "teal", 3),
        ("on-gold", "gold", 4.5),
    ],
)
def test_text_can_be_read(theme: int, text: str, paper: str, least: float) -> None:
    colours = palettes()[theme]
    light, dark = sorted((luminance(colours[text]), luminance(colours[paper])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least
