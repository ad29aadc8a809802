"""MkDocs hook: formulas as MathML, which browsers display without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marks as a formula."""

    def replace(found: re.Match[str]) -> str:
        kind, bracket, formula = found.groups()
        math = convert(html.unescape(formula).strip(), display="block" if bracket == "[" else "inline")
        return f'<{kind} class="formula">{math}</{kind}>'

    return _FORMULA.sub(replace, content)
