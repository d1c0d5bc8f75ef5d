"""Puts measured tables into the pages: `python docs/tables.py` (with `--check`: says what is out of date).

Between `<!-- table: FILE -->` and `<!-- end -->` stands what the file's tables say; a command wrote the file.
`<!-- table: FILE; method, text -->` shows only these columns, `<!-- table: FILE; method, text, task=all -->`
only these rows of them, `method=gates|nla` those of either.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(
    r"(?P<start><!-- table: (?P<file>[^\s;]+)(?:; (?P<columns>[^>]+?))? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def filled(page: str) -> str:
    """The page's text with the tables as the files have them now."""

    def table_of(place: re.Match[str]) -> str:
        lines = (ROOT / place["file"]).read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if not rows:
            raise SystemExit(f"{place['file']} has no table")
        if place["columns"]:
            rows = _chosen(rows, place["columns"].split(", "), place["file"])
        return "\n".join([place["start"].rstrip("\n"), *rows, place["end"]])

    return _PLACE.sub(table_of, page)


def _chosen(rows: list[str], wanted: list[str], file: str) -> list[str]:
    """The rows of one table with only these columns, and with these values where one is wanted."""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    columns = [name for name in wanted if "=" not in name]
    pairs = (one.split("=", 1) for one in wanted if "=" in one)
    values = {name: allowed.split("|") for name, allowed in pairs}
    if missing := [name for name in (*columns, *values) if name not in cells[0]]:
        raise SystemExit(f"{file} has no columns {missing}; it has {cells[0]}")
    at = {name: cells[0].index(name) for name in (*columns, *values)}
    kept = [row for row in cells[2:] if all(row[at[name]] in allowed for name, allowed in values.items())]
    if not kept:
        raise SystemExit(f"{file} has no rows with {values}")
    return ["| " + " | ".join(row[at[name]] for name in columns) + " |" for row in (*cells[:2], *kept)]


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
