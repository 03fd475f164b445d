"""How the API page reads our source: names mean what they mean in Python, and doctests are code."""

import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object


class Kdloss(Extension):
    """For mkdocstrings (mkdocs.yml)."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Doctests become blocks of code."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?:^>>> .*\n?(?:^.+\n?)*)", _block, obj.docstring.value, flags=re.MULTILINE)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """A function in a module of its own name is what the package's name means."""
        for module in [pkg, *(x for x in pkg.members.values() if isinstance(x, Module))]:
            for name, member in list(module.members.items()):
                if isinstance(member, Module) and module.imports.get(name) == f"{member.path}.{name}":
                    module.set_member(name, Alias(name, member[name], parent=module))


def _block(found: re.Match[str]) -> str:
    return f"```pycon\n{found[0].rstrip()}\n```\n"
