"""The documentation builds without a warning, and every link and picture of the built site is there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = re.compile(r"https?:|data:|mailto:|javascript:|//")


def broken_links(site: pathlib.Path) -> list[str]:
    """Links and pictures of a site that lead to no file, or to no heading in it."""
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    names = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    broken = []
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if OUTSIDE.match(link):
                continue
            file, _, heading = link.partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            is_there = target.exists() and (not heading or heading.startswith("__") or heading in names.get(target, ()))
            if not is_there:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


@pytest.mark.docs
def test_the_built_site_has_no_broken_links(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert broken_links(tmp_path / "site") == []
    text = (tmp_path / "site" / "index.html").read_text()
    for page in re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.M):
        assert page == "index.md" or page.rpartition(".")[0].removesuffix("/index") in text, f"{page} is in no menu"


def test_the_check_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there"><a href="b.html#gone"><img src="c.png"><a href="#x" id="x">'
    )
    (tmp_path / "b.html").write_text('<h1 id="there"><a href="https://example.org/">')
    assert broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.png"]
