"""What the documentation names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_test_that_holds_a_guarantee_exists() -> None:
    named = set(re.findall(r"`((?:test_|Test)\w+)`", GUARANTEES))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^(?:async )?(?:def|class) (\w+)", sources, re.MULTILINE))
    there |= set(re.findall(r"^(Test\w+) = ", sources, re.MULTILINE))
    assert len(named) > 60
    assert named - there == set()


def test_every_row_of_guarantees_names_a_test() -> None:
    tables = GUARANTEES.partition("## The guarantees and their tests")[2].partition("## What is not guaranteed")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| guar"))]
    assert len(rows) > 30
    assert [row for row in rows if "`test_" not in row.rsplit("|", 2)[1]] == []


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
