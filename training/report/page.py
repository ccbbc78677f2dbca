"""One HTML page that needs nothing but itself: no script, no address, images inside, every word of a user escaped."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from training.report.drawing import Image

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 1080px; padding: 1.5rem; }
h1 { margin-bottom: 0; } h2 { border-top: 1px solid #ddd; margin-top: 2.2rem; padding-top: 1rem; }
nav a { margin-right: 1rem; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .note { color: #555; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.figure { font-variant-numeric: tabular-nums; text-align: right; } .wide { overflow-x: auto; }
pre { background: #f5f5f5; overflow-x: auto; padding: .8rem; }
"""
_MIME = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, as HTML made by the functions of this module."""

    title: str
    parts: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """For links inside the page."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page. The browser is told to load nothing, so that a mistake here cannot fetch or run anything either."""
    links = " ".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{"".join(section.parts)}</section>'
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="note">{escape(summary)}</p>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def note(text: str) -> str:
    """A sentence."""
    return f'<p class="note">{escape(text)}</p>\n'


def code(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>\n"


def image(picture: Image, caption: str = "") -> str:
    """A plot with its data inside."""
    data = base64.b64encode(picture.data).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:{_MIME[picture.kind]};base64,{data}"
    return f'<figure><img alt="{escape(picture.text)}" src="{source}">{below}</figure>\n'


def table(header: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> str:
    """A table; numbers stand right."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{lines}</table></div>\n'


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="figure">{escape(number(value))}</td>'


def number(value: int | float) -> str:
    """Four significant digits; "undefined" for what is not finite."""
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or value in (float("inf"), float("-inf")):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
