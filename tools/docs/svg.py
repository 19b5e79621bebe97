"""The report's figures as SVG: bars in rows, bars in columns, stepped lines.

The report draws with plotly in the browser; pages of the site hold the same figures without a
script. Colours of bars are the report's, text and grid take those of the page they stand in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import Any

WIDTH, ROW, TOP, BOTTOM = 820, 30, 44, 46
_LETTER = 6.4  # pixels of an average letter at 12 px
Trace = dict[str, Any]


@dataclass(frozen=True)
class _Axis:
    """Numbers from 0 to ``high`` along ``length`` pixels that begin at ``start``."""

    high: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return round(self.start + self.length * value / self.high, 2)

    def ticks(self) -> list[float]:
        """Return about six round numbers."""
        rough = self.high / 6
        power = 10.0 ** floor(log10(rough))
        step = min((s * power for s in (1, 2, 5, 10) if s * power >= rough), default=power)
        return [i * step for i in range(floor(self.high / step + 1e-9) + 1)]


def draw(figure: Any, title: str) -> str:
    """Return a figure of the report as one SVG element.

    Args:
        figure: A plotly figure of bars or lines.
        title: What it shows, for those who cannot see it.
    """
    raw = json.loads(figure.to_json())
    data, layout = raw["data"], raw["layout"]
    bars = [trace for trace in data if trace["type"] == "bar"]
    if not bars:
        return _lines(data, layout, title)
    if bars[0].get("orientation") == "h":
        return _rows(bars, [t for t in data if t["type"] == "scatter"], layout, title)
    return _columns(bars, layout, title)


def _svg(height: float, parts: Iterable[str], title: str) -> str:
    return (
        f'<svg class="picture" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {style}/>'


def _rect(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0.0):g}" height="{height:g}" '
        f'fill="{colour}" fill-opacity="{opacity:g}"/>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _axis_title(layout: dict[str, Any], name: str) -> str:
    return str(layout.get(name, {}).get("title", {}).get("text", ""))


def _legend(traces: Iterable[Trace], left: float) -> list[str]:
    parts, x, seen = [], left, set()
    for trace in traces:
        name, colour = str(trace.get("name") or ""), _colour(trace)
        if not name or name in seen or trace.get("showlegend") is False:
            continue
        seen.add(name)
        parts += [_rect(x, 12, 12, 12, colour, 1.0), _text(x + 18, 22, name)]
        x += 34 + _LETTER * len(name)
    return parts


def _colour(trace: Trace) -> str:
    return str(trace.get("marker", {}).get("color") or trace.get("line", {}).get("color"))


def _rows(bars: Sequence[Trace], marks: Sequence[Trace], layout: Any, title: str) -> str:
    names = list(dict.fromkeys(name for trace in bars for name in trace["y"]))
    left = 14 + _LETTER * max(map(len, names))
    ends: dict[str, float] = dict.fromkeys(names, 0.0)
    boxes: list[tuple[Trace, int, str, float, float]] = []
    for trace in bars:
        for index, (name, size) in enumerate(zip(trace["y"], trace["x"], strict=True)):
            base = trace["base"][index] if trace.get("base") else ends[name]
            boxes.append((trace, index, name, base, size))
            ends[name] = max(ends[name], base + size)
    high = max([*ends.values(), *(value for mark in marks for value in mark["x"])])
    axis = _Axis(high * 1.01, left, WIDTH - left - 16)
    bottom = TOP + ROW * len(names)
    parts = [*_legend([*bars, *marks], left), *_down(axis, bottom, _axis_title(layout, "xaxis"))]
    for row, name in enumerate(names):
        parts.append(_text(left - 8, TOP + ROW * row + ROW / 2 + 4, name, "end"))
    for trace, index, name, base, size in boxes:
        parts += _bar(trace, index, axis, TOP + ROW * names.index(name) + 4, base, size)
    for mark in marks:
        style = f'stroke="{_colour(mark)}" stroke-width="2"'
        for name, value in zip(mark["y"], mark["x"], strict=True):
            y = TOP + ROW * names.index(name)
            parts.append(_line(axis(value), y + 2, axis(value), y + ROW - 2, style))
    parts += _verticals(layout, axis, bottom)
    return _svg(bottom + BOTTOM, parts, title)


def _bar(trace: Trace, index: int, axis: _Axis, y: float, base: float, size: float) -> list[str]:
    marker, x, width = trace["marker"], axis(base), axis(base + size) - axis(base)
    opacity = marker.get("opacity", 1.0)
    opacity = opacity[index] if isinstance(opacity, list) else opacity
    parts = [_rect(x, y, width, ROW - 8, str(marker["color"]), opacity)]
    text = str((trace.get("text") or [""] * (index + 1))[index])
    if text and width > 4 + _LETTER * len(text):
        inside = ' class="inside"'
        parts.append(_text(x + width / 2, y + ROW / 2, text, "middle", inside))
    return parts


def _down(axis: _Axis, bottom: float, title: str) -> list[str]:
    """Return grid lines, numbers and title of an axis below rows."""
    parts = []
    for value in axis.ticks():
        parts.append(_line(axis(value), TOP, axis(value), bottom, 'class="grid"'))
        parts.append(_text(axis(value), bottom + 16, _number(value), "middle"))
    return [*parts, _text(axis.start + axis.length / 2, bottom + 36, title, "middle")]


def _verticals(layout: dict[str, Any], axis: _Axis, bottom: float) -> list[str]:
    """Return the lines that the figure has across all rows, with what stands beside them."""
    parts = []
    for shape in layout.get("shapes", []):
        colour = shape["line"]["color"]
        style = f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 4"'
        parts.append(_line(axis(shape["x0"]), TOP - 4, axis(shape["x0"]), bottom, style))
    for note in layout.get("annotations", []):
        parts.append(_text(axis(note["x"]), TOP - 8, note["text"], "end"))
    return parts


def _columns(bars: Sequence[Trace], layout: Any, title: str) -> str:
    groups, names = bars[0]["x"]
    sums = [sum(trace["y"][index] for trace in bars) for index in range(len(names))]
    left, height = 56, 220
    axis = _Axis(max(sums) * 1.05, TOP + height, -height)
    step = (WIDTH - left - 16) / len(names)
    parts = _legend(bars, left)
    for value in axis.ticks():
        parts.append(_line(left, axis(value), WIDTH - 16, axis(value), 'class="grid"'))
        parts.append(_text(left - 8, axis(value) + 4, _number(value), "end"))
    longest = max(map(len, names))
    for index, name in enumerate(names):
        x, done = left + step * index, 0.0
        for trace in bars:
            size = trace["y"][index]
            top = axis(done + size)
            parts.append(_rect(x + step * 0.15, top, step * 0.7, axis(done) - top,
                               _colour(trace), 1.0))  # fmt: skip
            done += size
        turned = f' transform="rotate(-60 {x + step / 2:g} {TOP + height + 14:g})"'
        parts.append(_text(x + step / 2, TOP + height + 14, name, "end", turned))
        if index and groups[index] != groups[index - 1]:
            parts.append(_line(x, TOP - 6, x, TOP + height + 6, 'class="border"'))
        if not index or groups[index] != groups[index - 1]:
            parts.append(_text(x + 4, TOP - 2, groups[index]))
    below = 24 + 0.87 * _LETTER * longest
    turned = f' transform="rotate(-90 14 {TOP + height / 2:g})"'
    parts.append(_text(14, TOP + height / 2, _axis_title(layout, "yaxis"), "middle", turned))
    return _svg(TOP + height + below, parts, title)


def _lines(data: Sequence[Trace], layout: Any, title: str) -> str:
    left, height = 64, 220
    across = _Axis(max(max(trace["x"]) for trace in data), left, WIDTH - left - 16)
    up = _Axis(max(max(trace["y"]) for trace in data) * 1.05, TOP + height, -height)
    parts = [
        *_legend(data, left),
        *_down(across, TOP + height, _axis_title(layout, "xaxis")),
    ]
    for value in up.ticks():
        parts.append(_line(left, up(value), WIDTH - 16, up(value), 'class="grid"'))
        parts.append(_text(left - 8, up(value) + 4, _number(value), "end"))
    for trace in data:
        path = [f"M {across(trace['x'][0]):g} {up(trace['y'][0]):g}"]
        for x, y in zip(trace["x"][1:], trace["y"][1:], strict=True):
            path.append(f"H {across(x):g} V {up(y):g}")
        line = trace["line"]
        parts.append(f'<path d="{" ".join(path)}" fill="none" stroke="{line["color"]}" '
                     f'stroke-width="{line["width"]}"/>')  # fmt: skip
    turned = f' transform="rotate(-90 14 {TOP + height / 2:g})"'
    parts.append(_text(14, TOP + height / 2, _axis_title(layout, "yaxis"), "middle", turned))
    return _svg(TOP + height + BOTTOM, parts, title)
