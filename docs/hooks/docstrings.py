"""Griffe extension: docstrings of this package as Markdown.

The docstrings hold formulas in the notation of Sphinx, examples without a fence, and names of classes and functions as
code. They become formulas, blocks and links of the site.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

_BLOCK = re.compile(r"^( *)\.\. math::[ \n]*(.*(?:\n(?:\1 +\S.*))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_EXAMPLE = re.compile(r"^( *)>>> .*\n(?:\1\S.*\n|\1 +\S.*\n)*", re.MULTILINE)
_DIRECTIVE = re.compile(r" *# doctest:.*$", re.MULTILINE)


@cache
def documented() -> dict[str, str]:
    """Return the full name of each object that has a place in docs/reference/api, by its last part."""
    pages = (Path(__file__).resolve().parents[1] / "reference" / "api").glob("*.md")
    names = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
    return {name.rsplit(".", 1)[1]: name for name in names}


def linked(docstring: str, own_name: str) -> str:
    """Return a docstring with links from names in backticks to their places, except from an object to itself."""

    def link(found: re.Match[str]) -> str:
        name = found["name"]
        path = documented().get(name) if name and name != own_name else None
        return f"[`{name}`][{path}]" if path else found[0]

    return re.sub(rf"{_EXAMPLE.pattern}|(?<![\[`])`(?P<name>\w+)`(?![\]`])", link, docstring, flags=re.MULTILINE)


def to_markdown(docstring: str) -> str:
    r"""Return a docstring with formulas between dollar signs, and examples in fences.

    >>> print(to_markdown("Sum.\n\n.. math:: a = b\n\nWith :math:`b`.\n\n>>> 1 + 1\n2"))
    Sum.
    <BLANKLINE>
    $$
    a = b
    $$
    <BLANKLINE>
    With $b$.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """

    def block(found: re.Match[str]) -> str:
        indent = found[1]
        formula = "\n".join(f"{indent}{line.strip()}" for line in found[2].splitlines())
        return f"{indent}$$\n{formula}\n{indent}$$"

    def example(found: re.Match[str]) -> str:
        indent = found[1]
        return f"{indent}```pycon\n{_DIRECTIVE.sub('', found[0])}{indent}```\n"

    text = _INLINE.sub(lambda found: f"${found[1]}$", _BLOCK.sub(block, docstring))
    return _EXAMPLE.sub(example, text + "\n").rstrip("\n")


class Docstrings(griffe.Extension):
    """Convert every docstring when it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(linked(obj.docstring.value, obj.name))
