"""Altair charts as still SVG pictures that can do nothing but be seen (ours)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from gradsift.errors import DependencyError

if TYPE_CHECKING:
    import altair as alt

_ELEMENTS = frozenset({"svg", "g", "path", "line", "rect", "text", "tspan", "circle"})
_ATTRIBUTE = re.compile(r"on|href|style|src", re.IGNORECASE)


def require_charts() -> None:
    """Refuse when the packages of the extra ``[report]`` are absent.

    Raises:
        DependencyError: altair or vl-convert-python is not installed.
    """
    absent = [name for name in ("altair", "vl_convert") if find_spec(name) is None]
    if absent:
        raise DependencyError(
            "the report needs packages that are not installed",
            got=f"no {' and no '.join(absent)}",
            expected="the extra [report]: altair and vl-convert-python",
            do="pip install 'gradsift[report]'",
        )


def render_svg(chart: alt.LayerChart) -> str:
    """Turn a chart into a still picture.

    Args:
        chart: any chart of this module.

    Returns:
        SVG text without scripts, links, styles or identifiers that could clash on the page.

    Raises:
        DependencyError: the extra ``[report]`` is absent.
    """
    require_charts()
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=version, allowed_base_urls=[])
    # Coordinates only: what an axis says keeps its digits.
    svg = re.sub(r'="[^"]*"', lambda part: re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", part[0]), svg)
    check_svg(svg)
    return svg


def check_svg(svg: str) -> None:
    """Make sure that a picture can do nothing but be seen.

    Args:
        svg: SVG text.

    Raises:
        ValueError: it is not well-formed, or holds an element or attribute beyond shapes and text (our own mistake).
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"the SVG is not well-formed: {error}") from None
    for element in root.iter():
        name = str(element.tag).rpartition("}")[2]
        if name not in _ELEMENTS:
            raise ValueError(f"the SVG holds <{name}>")
        for key, value in element.attrib.items():
            if _ATTRIBUTE.match(key.rpartition("}")[2]) or key == "id" or "url(" in value:
                raise ValueError(f"the SVG holds the attribute {key}={value[:40]!r}")
