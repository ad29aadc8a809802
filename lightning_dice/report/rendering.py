"""Rendering of the HTML pages, by jinja2 templates."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render_template(package: str, name: str, **context: Any) -> str:
    """Render a template; every value is escaped.

    Args:
        package: whose folder `templates` has the template. It may extend and import those of this package.
        name: of the template's file.
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
