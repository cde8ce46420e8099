"""A matplotlib figure as SVG inside the page: in the page's colours and letters, and safe beside other figures."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
INK = ("#000000", "black")
# Letters come from the page; everything else that matplotlib writes as a style is an attribute of SVG too.
FONT = ("font", "font-family", "font-style", "font-variant", "font-stretch")


def inline(figure: Figure, name: str, label: str) -> Markup:
    """One figure as an `<svg>` element.

    The page's Content-Security-Policy lets no style stand on an element, so styles become attributes; black
    becomes the text's colour; every other colour also becomes a class (`fill-0072b2`), which the page's CSS
    may give another tone in the dark. Ids are prefixed with `name`, since a page holds several figures.

    Args:
        name: unique in the page; letters, digits and hyphens.
        label: what a screen reader says instead of the picture.
    """
    import matplotlib

    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="none")
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {
        "class": "chart",
        "role": "img",
        "aria-label": label,
        "focusable": "false",
        "fill": "currentColor",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _restyle(element: ElementTree.Element, name: str) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if value and key.strip() not in FONT:
            element.set(key.strip(), value.strip())
    classes = []
    for key in ("fill", "stroke"):
        colour = element.get(key, "").lower()
        if colour in INK:
            element.set(key, "currentColor")
        elif re.fullmatch(r"#[0-9a-f]{6}", colour):
            classes.append(f"{key}-{colour[1:]}")
    if classes:
        element.set("class", " ".join(classes))
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.attrib['id']}")
    for key, value in element.attrib.items():
        if key == f"{{{XLINK}}}href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
