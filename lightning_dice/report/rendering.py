"""Render the HTML pages from jinja2 templates."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render_template(package: str, name: str, **context: Any) -> str:
    """Render a template; every value is escaped.

    Args:
        package: its folder `templates` has the template, which may extend and import others in this package.
        name: the template's file name.
        context: the template's variables.

    >>> page = render_template("lightning_dice.report", "base.html.j2", title="a < b", subtitle="")
    >>> "<h1>a &lt; b</h1>" in page
    True
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("lightning_dice.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(context)
