"""What the site has beside the pages of docs/: the files of the repository that pages link to, and llms.txt."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
ROLE = re.compile(r":\w+:`~?([\w.]+)`")


class PlainRoles(griffe.Extension):
    """Sphinx roles of docstrings (``:class:`PPO```) as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the navigation that are outside docs/, what pages link to outside it, and llms.txt."""
    pages = list(_pages(config.nav))
    outside = [ROOT / page for _, page in pages if not (ROOT / "docs" / page).exists()]
    for source in [*(Path(file.abs_src_path or "") for file in files.documentation_pages()), *outside]:
        outside += [path for path in _links(source).values() if path not in outside and not _in_docs(path)]
    in_nav = {page for _, page in pages}
    for path in outside:
        level = InclusionLevel.INCLUDED if _uri(path) in in_nav else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, _uri(path), abs_src_path=str(path), inclusion=level))
    files.append(File.generated(config, "llms.txt", content=_overview(config, pages)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to where the site has the files."""
    links, folder = _links(Path(page.file.abs_src_path or "")), posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda found: posixpath.relpath(_uri(links[found[1]]), folder or "."), markdown)


def _links(source: Path) -> dict[str, Path]:
    """The files that a page links to, by link."""
    links = {link: (source.parent / link).resolve() for link in LINK.findall(source.read_text())}
    for link, path in links.items() if source.suffix == ".md" else ():
        if not path.is_file():
            raise PluginError(f"{source.relative_to(ROOT)} links to {link}, which is no file: mend the link")
    return links if source.suffix == ".md" else {}


def _in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")


def _uri(path: Path) -> str:
    """Of a file, in the site."""
    return path.relative_to(ROOT / "docs" if _in_docs(path) else ROOT).as_posix()


def _pages(nav: Any) -> Iterator[tuple[str, str]]:
    """Title and file of all pages of the navigation, in its order."""
    for title, entry in (pair for item in nav for pair in item.items()):
        if isinstance(entry, str):
            yield title, entry
        else:
            yield from _pages(entry)


def _overview(config: MkDocsConfig, pages: list[tuple[str, str]]) -> str:
    """The site for language models (llmstxt.org): each page with its first paragraph."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for title, page in pages:
        path = ROOT / "docs" / page
        blocks = (path if path.exists() else ROOT / page).read_text().split("\n\n")
        text = next((" ".join(block.split()) for block in blocks if re.match(r"[A-Z`*]", block)), title)
        sentence = re.split(r"(?<=[.:]) ", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))[0]
        lines.append(f"- [{title}]({page.removesuffix('.md')}.html): {sentence}")
    return "\n".join(lines) + "\n"
