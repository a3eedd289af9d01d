"""Docstrings name other objects as Sphinx does, ``:func:`~tta.adapt` ``: made links where the object has a place on a page."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Turn roles into links of mkdocs-autorefs that stay plain text where nothing is found."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda found: self._link(obj, *found.groups()), obj.docstring.value)

    @staticmethod
    def _link(obj: griffe.Object, short: str, name: str) -> str:
        home = obj if isinstance(obj, griffe.Class | griffe.Module) else obj.parent
        path = name
        while not name.startswith("tta.") and home is not None:
            if name.partition(".")[0] in home.members:
                path = f"{home.path}.{name}"
                break
            home = home.parent
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
