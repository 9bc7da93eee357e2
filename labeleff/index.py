"""The generated listing of components, read by the command line in place of importing torch.

``python -m labeleff.index`` writes it, and the pages of all components (:mod:`labeleff.pages`); a test keeps them true.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from labeleff import pages, registry

PATH = Path(__file__).parent / "_index.json"


def build_index() -> dict[str, Any]:
    """Return kind -> name -> first line of the docstring and options of our own components."""
    index: dict[str, Any] = {}
    for kind in registry.PACKAGES:
        index[kind] = {}
        for name in registry.names(kind):  # type: ignore[arg-type]  # PACKAGES is keyed by kind
            factory = registry.get(kind, name)  # type: ignore[arg-type]
            if not factory.__module__.startswith("labeleff."):
                continue
            options = {
                option.name: {
                    "type": inspect.formatannotation(option.type).replace("typing.", ""),
                    "default": "(required)" if option.required else repr(option.default),
                    "help": option.help,
                }
                for option in registry.options(factory).values()
            }
            summary = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
            index[kind][name] = {"summary": summary, "options": options}
    return index


def render() -> str:
    """Return the text of ``_index.json``."""
    return json.dumps(build_index(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())
    if pages.FOLDER.parent.is_dir():  # not where the package is installed without its source
        pages.FOLDER.mkdir(exist_ok=True)
        for name, text in pages.render_pages().items():
            (pages.FOLDER / name).write_text(text)
