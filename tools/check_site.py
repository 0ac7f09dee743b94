"""Links and contents of the built documentation, without a network.

    python -m tools.check_site build/docs

Every link from a page into the site has to lead somewhere: to a file, and to a place in it where it
names one. Links to other sites are listed by their number only: nobody is asked.
"""

from __future__ import annotations

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The places of a page that can be linked to, and where its links lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places, self.links = {""}, list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif (tag, name) in (("a", "href"), ("img", "src"), ("link", "href")) and value:
                self.links.append(value)


def broken(site: Path) -> tuple[list[str], int, int]:
    """Links that lead nowhere, and how many there are within the site and out of it."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    wrong, inside, outside = [], 0, 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside += 1
                continue
            inside += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = target.exists()
            if found and target in pages:
                found = unquote(parts.fragment) in pages[target].places
            if not found:
                wrong.append(f"{path.relative_to(site.resolve())}: {link}")
    return wrong, inside, outside


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path, help="folder of the built pages")
    site = parser.parse_args().site
    wrong, inside, outside = broken(site)
    if not inside:
        print(f"{site}: expected built pages with links, found none. Remedy: make docs")
        return 1
    for line in wrong:
        print(f"leads nowhere: {line}")
    print(f"{inside} links within the pages, {len(wrong)} lead nowhere; {outside} to other sites")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
