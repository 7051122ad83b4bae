# SPDX-License-Identifier: Apache-2.0
"""What is documented, without building it; `make docs` does that."""

import ast
import importlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("module", ["", ".conversion", ".training", ".evaluation"])
def test_the_reference_has_all_that_is_exported(module):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = {identifier.rpartition(".")[2] for identifier in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    exported = importlib.import_module(f"diffusers_hart{module}").__all__
    assert set(exported) - listed == set()


def test_every_listed_name_exists():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for identifier in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = identifier.rpartition(".")
            assert hasattr(importlib.import_module(module), name), identifier


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "examples" / "README.md"], ids=lambda page: page.name
)
def test_code_of_the_guides_is_code(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_every_guide_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation
