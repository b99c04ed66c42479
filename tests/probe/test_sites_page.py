"""`docs/probe.md` has the table of sites as the code has it, whose every line `test_architectures.py` verifies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from insitu.families import MEANINGS, Place
from insitu.sites.architectures import FAMILIES

PAGE: Final = Path(__file__).parents[2] / "docs/probe.md"
BEGIN, END = "<!-- table of sites: tests/probe/test_sites_page.py writes it -->\n", "\n<!-- end of the table -->"


def _where(place: Place, around: str) -> str:
    of = f"`{place.path}`" if place.path else f"the {around}"
    io = f"{place.io}[{place.index}]" if place.index else place.io
    fused = {"blocks": ", its columns", "heads": ", its columns of each head", "": ""}[place.fused]
    return f"{of} {io}{fused}"


def table() -> str:
    """Return the table of `docs/probe.md`: where each site lies, and in which families."""
    places: dict[str, dict[str, list[str]]] = {name: {} for name in MEANINGS}
    for family in FAMILIES:
        outside = [family.embed, *([family.final_norm] if family.final_norm else []), *family.logits]
        for place, around in [*((p, "layer") for p in family.places), *((p, "model") for p in outside)]:
            places[place.name].setdefault(_where(place, around), []).append(family.title)
    lines = ["| site | what it is |", "|---|---|", *(f"| `{name}` | {MEANINGS[name]} |" for name in places)]
    lines += ["", "| site | where | in |", "|---|---|---|"]
    for name, found in places.items():
        for where, titles in found.items():
            everywhere = len(set(titles)) == len(FAMILIES)
            lines.append(f"| `{name}` | {where} | {'all' if everywhere else '; '.join(titles)} |")
    return "\n".join(lines)


def test_the_page_has_the_table_that_was_verified() -> None:
    text = PAGE.read_text()
    found = text.partition(BEGIN)[2].partition(END)[0]
    assert found == table(), "docs/probe.md is stale: run `python tests/probe/test_sites_page.py`"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table() + END, page))
