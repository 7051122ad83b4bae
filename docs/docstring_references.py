# SPDX-License-Identifier: Apache-2.0
"""Makes docstrings, which are written as in diffusers, what mkdocstrings expects: links, and types without markup."""

import re
from pathlib import Path
from typing import Any

import griffe


REFERENCE = re.compile(r"\[`(~?)([A-Za-z_0-9.]+)`\]")
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
ARGUMENT = re.compile(r"^( +[a-z_0-9, ]+ \()(.+?)(\):)", re.MULTILINE)
RETURNED = re.compile(r"^( *Returns:\n +)([^:\n]+)(:|\.$)", re.MULTILINE)


class DocstringReferences(griffe.Extension):
    """
    [`Name`] and [`~Name.method`] become links to what the pages of `docs/api` list, and any other name code. Types of
    arguments and results lose their markup, for they are shown as they are, and their defaults, which have a column.
    """

    def __init__(self):
        pages = [page.read_text(encoding="utf-8") for page in (Path(__file__).parent / "api").glob("*.md")]
        listed = [identifier for page in pages for identifier in DIRECTIVE.findall(page)]
        self.identifiers = {identifier.rpartition(".")[2]: identifier for identifier in listed}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ARGUMENT.sub(self._without_markup, obj.docstring.value)
            text = RETURNED.sub(self._without_markup, text)
            obj.docstring.value = REFERENCE.sub(self._link, text)

    def _without_markup(self, match: re.Match) -> str:
        before, types, after = match.groups()
        types = re.sub(r", (\*optional\*|defaults to .*)", "", types)
        return before + REFERENCE.sub(r"\2", types).replace("`", "") + after

    def _link(self, reference: re.Match) -> str:
        is_short, name = reference.groups()
        owner, _, member = name.partition(".")
        text = f"`{member if is_short and member else name}`"
        if owner not in self.identifiers:
            return text
        return f"[{text}][{self.identifiers[owner]}{'.' + member if member else ''}]"
