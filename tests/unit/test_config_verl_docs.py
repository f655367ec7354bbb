"""docs/verl.md shows the tables as they are."""

from __future__ import annotations

from trainer.config.verl.document import BEGIN, END, PAGE, tables, with_tables
from trainer.config.verl.tables import MOVED, RULES

ROOT = PAGE.parents[1]


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert with_tables(page) == page, "run: python -m trainer.config.verl.document"


def test_every_row_is_in_the_tables() -> None:
    text = tables()
    for old in MOVED:
        assert f"| `{old}` |" in text
    for rule in RULES:
        assert f"`{rule.pattern.replace(',', ', ')}`" in text
        assert rule.why.replace("|", "or") in text


def test_the_readme_leads_there() -> None:
    assert "(docs/verl.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
