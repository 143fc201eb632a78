"""Matplotlib figures as inline markup: SVG that follows the page's colour scheme, else PNG."""

import base64
import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

THEMED = "themed"
"""`gid` of figures drawn only with the colours of a theme; others get a white background."""

_LARGEST_SVG = 1_000_000
_PIXELS_PER_POINT = 1.48
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


def inline_figure(figure: Figure, alt: str, prefix: str, theme: Mapping[str, str]) -> tuple[Markup, bool]:
    """Return the markup of `figure` and whether it needs a white background.

    `prefix` keeps ids of several figures apart. `theme` maps hex colours to CSS custom properties, for figures whose
    gid is `THEMED`. Figures too large for SVG, or with text that XML cannot hold, become a PNG at twice the screen
    resolution.
    """
    themed = figure.get_gid() == THEMED
    try:
        root = ElementTree.fromstring(_svg(figure, themed))
    except ElementTree.ParseError:
        return _png(figure, alt), True
    _rewrite(root, prefix, theme if themed else {})
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": alt,
        "style": f"width:{width * _PIXELS_PER_POINT:.0f}px",
    }
    text = ElementTree.tostring(root, encoding="unicode")
    if len(text) > _LARGEST_SVG:
        return _png(figure, alt), True
    return Markup(text), not themed


def _svg(figure: Figure, themed: bool) -> str:
    buffer = io.StringIO()
    # Text of themed figures uses the page's fonts; other figures may have formulas, which need outlines.
    settings = {"svg.fonttype": "none" if themed else "path", "svg.hashsalt": "palimpsest"}
    with matplotlib.rc_context(settings):
        if themed:
            figure.savefig(buffer, format="svg", transparent=True, bbox_inches=None)
        else:
            figure.savefig(buffer, format="svg", bbox_inches="tight")
    return buffer.getvalue()


def _png(figure: Figure, alt: str) -> Markup:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width = figure.get_figwidth() * 72 * _PIXELS_PER_POINT
    return Markup('<img alt="{}" style="width:{}px" src="data:image/png;base64,{}">').format(alt, round(width), data)


def _rewrite(root: ElementTree.Element, prefix: str, theme: Mapping[str, str]) -> None:
    """Remove namespaces, metadata and style sheets (they would affect the page), prefix ids, apply the theme."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in {"metadata", "style", "script"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if element.tag == "g":
            attributes.pop("id", None)
        element.attrib = {
            name: _attribute(name, value, prefix, theme)
            for name, value in attributes.items()
            if name != "type" and not (name == "href" and not value.startswith(("#", "data:image/")))
        }
        element.tail = None
        if element.tag not in {"text", "tspan"}:
            element.text = None


def _attribute(name: str, value: str, prefix: str, theme: Mapping[str, str]) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    if name == "d":
        return " ".join(_LONG_NUMBER.sub(_rounded, value).split())
    if name in {"x", "y"}:
        return _LONG_NUMBER.sub(_rounded, value)
    if name == "style":
        if theme:
            value = _FONT_FAMILY.sub("", value)
        for colour, variable in theme.items():
            value = value.replace(colour, f"var({variable})")
    return _REFERENCE.sub(rf"url(#{prefix}-\1)", value)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}"


def _local(name: str) -> str:
    return name.rpartition("}")[2]
