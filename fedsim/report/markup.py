"""HTML that escapes by default: text becomes markup only where :func:`tag` or :func:`raw` made it."""

from __future__ import annotations

import html
import json
import math
from typing import Any

_VOID = {"meta", "link", "br", "input"}
_JSON_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Html(str):
    """Text that is markup already."""


def raw(text: str) -> Html:
    """Markup of the package's own (its style sheet, its script); never a run's text."""
    return Html(text)


def escaped(value: Any) -> Html:
    """A value as text, safe in an element and in a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are no :class:`Html` are escaped, ``None`` is left out.

    ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; ``True`` gives a bare attribute, ``None`` none.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{together(*children)}</{name}>")


def together(*children: Any) -> Html:
    """Several pieces after one another."""
    return Html("".join(escaped(child) for child in children if child is not None))


def embedded_json(value: Any) -> Html:
    """JSON that cannot leave the script element it stands in; NaN and infinities become null."""
    return Html(json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).translate(_JSON_ESCAPES))


def plot_text(text: str) -> str:
    """Text for Plotly, which reads a little HTML in names and labels: escaped, it is shown as it is."""
    return html.escape(text, quote=False)


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(value)}"'


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
