"""HTML pages that need no other file: sections, tables, figures, and numbers as text."""

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from ppo_lightning.tools.charts import COLORS


def document(title: str, sections: Iterable[str]) -> str:
    """A page for wide and narrow windows, light and dark."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A part of a page under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as the window has room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, body: str, caption: str) -> str:
    """A figure with its title and caption."""
    return f"<figure><h3>{html.escape(title)}</h3>{body}<figcaption>{html.escape(caption)}</figcaption></figure>"


def image(svg: str, title: str) -> str:
    """An SVG within the page."""
    encoded = base64.b64encode(svg.encode()).decode()
    return f'<img class="chart" alt="{html.escape(title)}" src="data:image/svg+xml;base64,{encoded}">'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with HTML cells; narrow windows show each row as a list."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{html.escape(name)}">{cell}</td>' for name, cell in zip(header, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def colored(tag: str, index: int, text: str) -> str:
    """Text in the color of a curve."""
    return f'<{tag} class="c{index % len(COLORS)}">{html.escape(text)}</{tag}>'


def link(path: Path, place: Path) -> str:
    """The relative address of a path for a page in the folder ``place``."""
    return quote(Path(os.path.relpath(path, place)).as_posix())


def number(value: float | None) -> str:
    """A value in at most nine characters; a dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    if size < 0.1 or size >= 1e6:
        return f"{value:.2g}" if size < 1e-3 else f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# The dark theme inverts the lightness of charts and colored text, and keeps their hue.
STYLE = """:root{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--ink:#1f2328;--soft:#59636e;--grid:#d8dee4}
@media(prefers-color-scheme:dark){:root{--paper:#0d1117;--card:#161b22;--ink:#e6edf3;--soft:#9198a1;--grid:#30363d}
[class^=c]{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:16px}
h1{font-size:1.4rem;overflow-wrap:anywhere;margin:.2em 0 .6em}h2{font-size:1.1rem}h3{font-size:1rem;margin:0 0 .3em}
section>h3{margin-top:1em}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:12px;margin:12px 0}
figure{margin:0;padding:12px;background:var(--card);border-radius:8px;min-width:0}
figcaption{color:var(--soft);font-size:.85rem}
.chart{display:block;width:100%}
ul{list-style:none;padding:0;margin:.4em 0;font-size:.85rem}
figure li{display:inline-block;margin-right:1em}
figure li::before{content:"";display:inline-block;width:.8em;height:.8em;border-radius:2px;
margin-right:.4em;background:currentColor}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px;margin:0}
.facts div{background:var(--card);border-radius:8px;padding:8px 12px}
.facts .wide{grid-column:1/-1}.wide dd{font-size:1rem;font-weight:400;white-space:pre-line}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-weight:600;overflow-wrap:anywhere}
.paths li{margin:.2em 0;overflow-wrap:anywhere}
.bar{display:flex;height:28px;border-radius:6px;overflow:hidden;margin:.4em 0}.bar i{background:currentColor}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th{text-align:left;color:var(--soft);font-weight:500}
th,td{padding:6px 8px;border-bottom:1px solid var(--grid);vertical-align:top}td{overflow-wrap:anywhere;min-width:5em}
pre{background:var(--card);padding:12px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
summary{cursor:pointer;font-size:1.1rem;font-weight:600}
video{max-width:100%;border-radius:8px}
@media(max-width:800px){thead{display:none}tr{display:block;padding:8px 0;border-bottom:1px solid var(--grid)}
td{display:block;border:0;padding:2px 0}td::before{content:attr(data-name) ": ";color:var(--soft)}}
""" + "".join(f".c{index}{{color:{color}}}" for index, color in enumerate(COLORS))
