"""What browsers run: one module a page, and no text of a record ever read as markup."""

from __future__ import annotations

import pytest

from insitu_dashboard.components import PARTS, WEB, script_of, style


@pytest.mark.parametrize("page", list(PARTS))
def test_a_page_is_one_module(page: str) -> None:
    script = script_of(page)
    assert script.count("export default") == 1
    assert "import " not in [line[:7] for line in script.splitlines()]


def test_every_file_is_used() -> None:
    used = {name for parts in PARTS.values() for name in parts}
    assert used == {file.name for file in WEB.glob("*.js")}
    assert all(file.read_text() in style() for file in WEB.glob("*.css"))


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("])
def test_nothing_reads_text_as_markup(word: str) -> None:
    scripts = {file.name: file.read_text() for file in WEB.glob("*.js")}
    lines = [f"{name}: {line}" for name, text in scripts.items() for line in text.splitlines() if word in line]
    assert [line for line in lines if "//" not in line] == []
