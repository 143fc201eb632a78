"""Colours of the steps of a denoising, for pages, the terminal and GIFs.

A sweep of the hue from blue-violet (early) over green to amber (late) at constant lightness and chroma of OKLCH, in
which equal steps look equally large (Bjorn Ottosson, "A perceptual color space for image processing", 2020). It follows
the blue-yellow axis, which all common forms of colour blindness keep.
"""

import math

FIRST_HUE, LAST_HUE = 285.0, 75.0  # degrees
_INK = (0.60, 0.115)  # lightness and chroma; contrast 3.6 or more on white and on black
_WASH = (0.84, 0.085)  # behind dark letters


def age(step: int, num_steps: int) -> float:
    """Return the position of `step` of 1..`num_steps` between the first step, 0, and the last, 1."""
    return min(1.0, max(0.0, (step - 1) / max(1, num_steps - 1)))


def ink(at: float, confidence: float = 1.0) -> str:
    """Return the colour of letters of age `at` in [0, 1], #rrggbb, greyer for low `confidence`."""
    lightness, chroma = _INK
    rgb = _rgb(lightness, (0.25 + 0.75 * strength(confidence)) * chroma, _hue(at))
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def wash(at: float, confidence: float, paper: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the background of letters of age `at`, 0..255 each, closer to `paper` for low `confidence`."""
    share = strength(confidence)
    colour = _rgb(*_WASH, _hue(at))
    return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, paper, strict=True))


def strength(confidence: float) -> float:
    """Return the strength of a token's colour: 0.2 for confidence 0, 1 for confidence 1."""
    return 0.2 + 0.8 * min(1.0, max(0.0, confidence))


def _hue(at: float) -> float:
    return FIRST_HUE + (LAST_HUE - FIRST_HUE) * at


def _rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """Convert OKLCH to sRGB, 0..255, clipped."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return tuple(round(255 * _gamma(min(1.0, max(0.0, value)))) for value in linear)


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
