"""Pages from the templates beside this file: HTML templates escape every value, Markdown ones use filters."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_compressm.reports import markdown
from hf_compressm.reports.tables import Table


PACKAGE = "hf_compressm"


def own_version() -> str:
    """The installed version of this package."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(not installed)"


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: name of its file; if it ends in `.html.jinja`, every value is escaped.
        **values: the values that it uses.
    """
    loader = PackageLoader(PACKAGE, "reports/templates")
    environment = Environment(
        loader=loader,
        autoescape=".html." in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": markdown.escaped, "code": markdown.code, "table": _table}
    return environment.get_template(template).render(**values)


def _table(table: Table) -> str:
    return markdown.table(table.head, table.rows)
