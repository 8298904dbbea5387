"""HTML from the templates beside this file, and numbers as text."""

import base64
import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from ppo_lightning.tools.charts import COLORS


@cache
def _templates() -> Environment:
    loader = PackageLoader("ppo_lightning.tools")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.globals["colors"] = COLORS
    templates.filters.update(base64=_base64, cell=cell, duration=duration)
    return templates


def render(template: str, **values: Any) -> str:
    """A page from a template in ``templates/``; values are escaped."""
    return _templates().get_template(template).render(values)


def _base64(contents: str | bytes) -> str:
    return base64.b64encode(contents.encode() if isinstance(contents, str) else contents).decode()


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
    return f"{value:,.0f}" if size >= 9999.5 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def cell(value: Any) -> str:
    """A value of plain data as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
