"""Puts measured tables into the pages: `python docs/tables.py` (with `--check`: says what is out of date).

Between `<!-- table: FILE -->` and `<!-- end -->` stands what the file's tables say; a command wrote the file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page's text with the tables as the files have them now."""

    def table_of(place: re.Match[str]) -> str:
        lines = (ROOT / place["file"]).read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if not rows:
            raise SystemExit(f"{place['file']} has no table")
        return "\n".join([place[1].rstrip("\n"), *rows, place[3]])

    return _PLACE.sub(table_of, page)


def main() -> None:
    """Fill all pages, or check them."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        name = str(path.relative_to(ROOT))
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if before != after:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        raise SystemExit(f"tables are out of date in {', '.join(stale)}: python docs/tables.py")


if __name__ == "__main__":
    main()
