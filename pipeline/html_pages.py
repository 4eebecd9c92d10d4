"""Self-contained HTML pages from the Jinja templates that lie in a package's `templates` folder."""

import jinja2


def render(package: str, template: str, **values: object) -> str:
    """Render a template. Values are escaped, and a name that is missing is an error.

    Args:
        package: dotted name of the package with the `templates` folder.
        values: variables and functions of the template, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
