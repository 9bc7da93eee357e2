"""The pages of all components under ``docs/components``, made from signatures and docstrings by ``python -m labeleff.index``.

A test keeps them true; nothing in them is written by hand.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from labeleff import registry
from labeleff.registry import Component, Option

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "components"
HEADINGS = "Args|Returns|Yields|Raises|Attributes"


class Kind(NamedTuple):
    """What a page is about."""

    title: str
    intro: str
    example: str


KINDS: Mapping[registry.Kind, Kind] = {
    "strategy": Kind(
        "Strategies",
        "What a stage minimises. Each passes the [contract checks](../add_a_strategy.md) that yours can go through too.",
        "stages:\n  - strategy: {name: bcp, decay: 0.95}\n    steps: 400",
    ),
    "annotator": Kind(
        "Annotators",
        "How labels change while a stage runs: corrected, pseudo-labelled, or [asked for](../labelling.md).",
        "stages:\n  - strategy: supervised\n    annotator: {name: pseudo_labels}\n    revise_every: 200",
    ),
    "backbone": Kind(
        "Backbones",
        "Networks, 2-D and 3-D where nothing else is said. [More about networks](../networks.md).",
        "backbone: {name: unet, channels: [16, 32, 64, 128]}",
    ),
    "dataset": Kind(
        "Data sets",
        "Layouts on disk, and generated ones that need no files. [Your own data](../your_data.md) need not be in one of them: "
        "`labeleff index` writes a manifest.",
        "data:\n  dataset: {name: manifest, path: my_scans.json}",
    ),
    "noise": Kind(
        "Label noise",
        "Ways to make labels wrong on purpose, once, before anything is learnt. [How they are used](../label_noise.md).",
        "data:\n  noise: {name: distance, target_dice: 0.8}",
    ),
    "prior": Kind(
        "Priors",
        "What is known of the sizes of organs in cases without labels. [How they are used](../adaptation.md).",
        "data:\n  prior: {name: constant}",
    ),
}
FILES: Mapping[registry.Kind, str] = {
    "strategy": "strategies",
    "annotator": "annotators",
    "backbone": "backbones",
    "dataset": "datasets",
    "noise": "noise",
    "prior": "priors",
}


def render_pages() -> dict[str, str]:
    """Return the pages of all kinds of components by their file names."""
    pages = {f"{FILES[kind]}.md": _page(kind) for kind in KINDS}
    rows = [
        f"| [{KINDS[kind].title}]({FILES[kind]}.md) | {', '.join(f'[`{n}`]({FILES[kind]}.md#{n})' for n in own(kind))} |"
        for kind in KINDS
    ]
    pages["README.md"] = "\n".join(
        [
            "# Components",
            "",
            "Everything that a recipe can name, with its options. Made from the code by `python -m labeleff.index`; the same on",
            "the terminal: `labeleff list strategies`, `labeleff list strategies bcp`.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )
    return pages


def own(kind: registry.Kind) -> list[str]:
    """Return the names of our own components of a kind."""
    return [name for name in registry.names(kind) if registry.get(kind, name).__module__.startswith("labeleff.")]


def _page(kind: registry.Kind) -> str:
    about = KINDS[kind]
    lines = [f"# {about.title}", "", about.intro, "", "```yaml", about.example, "```", "", "| | |", "|---|---|"]
    for name in own(kind):
        summary = _paragraphs(registry.get(kind, name))[0]
        lines.append(f"| [`{name}`](#{name}) | {_cell(' '.join(summary.split()))} |")
    for name in own(kind):
        lines += ["", *_component(kind, name)]
    return "\n".join(lines) + "\n"


def _component(kind: registry.Kind, name: str) -> list[str]:
    """Return the lines of one component."""
    factory = registry.get(kind, name)
    lines = [f"## {name}", ""]
    linked = [other for other in own(kind) if other != name] if kind == "strategy" else []
    for paragraph in _paragraphs(factory):
        lines += [_text(paragraph, linked), ""]
    lines += [f"*{' · '.join(_facts(kind, factory))}*", ""]
    options = registry.options(factory)
    if not options:
        return [*lines, "No options."]
    lines += ["| option | default | |", "|---|---|---|"]
    lines += [f"| `{o.name}` | {_default(o)} | {_cell(o.help)} {_kind_of_value(o)}|" for o in options.values()]
    return lines


def _facts(kind: registry.Kind, factory: Callable[..., Any]) -> list[str]:
    """Return what is worth knowing at a glance, the paper and the source last."""
    facts = []
    if kind == "strategy":
        facts.append(f"learns from: {_streams(factory)}")
        facts.append(f"regions that overlap: {'yes' if getattr(factory, 'supports_regions', False) else 'no'}")
        if getattr(factory, "follows", ()):
            facts.append(f"follows {', '.join(f'[`{n}`](#{n})' for n in factory.follows)}")  # type: ignore[attr-defined]
        if getattr(factory, "batch_joint", False):
            facts.append("its loss joins the batch")
    path = Path(inspect.getsourcefile(factory) or "").resolve().relative_to(ROOT)
    module = inspect.getmodule(factory)
    papers = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", f"{module.__doc__ or ''} {factory.__doc__ or ''}"))
    facts += [f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers]
    return [*facts, f"[{path.name}](../../{path.as_posix()})"]


def _streams(factory: Callable[..., Any]) -> str:
    """Return the streams of a strategy with its defaults."""
    try:
        streams = factory().streams()
    except TypeError:  # an option without a default
        return "depends on its options"
    named = [f"{name}{' (optional)' if stream.optional else ''}" for name, stream in streams.items()]
    return ", ".join(named) if named else "nothing"


def _paragraphs(factory: Callable[..., Any]) -> list[str]:
    """Return the docstring before its sections, paragraph by paragraph."""
    text = re.split(rf"\n(?:{HEADINGS}):\n", inspect.getdoc(factory) or "")[0]
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _text(text: str, linked: Sequence[str] = ()) -> str:
    """Return a docstring's words as Markdown, names of some components as links to them."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda found: f"`{found[1].rsplit('.', 1)[-1]}`", text)
    parts = []
    for part in re.split(r"(`+[^`]+`+)", text):
        word = part.strip("`")
        if not part.startswith("`"):  # a star that begins a line is an item of a list
            parts.append(re.sub(r"(?<!^)(?<!\n)\*", r"\\*", part).replace("<", "&lt;"))
        else:
            parts.append(f"[`{word}`](#{word})" if word in linked else f"`{word}`")
    return "".join(parts)


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    return _text(text).replace("|", "\\|").replace("\n", " ")


def _default(option: Option) -> str:
    if option.required:
        return "needed"
    value = option.default
    if isinstance(value, Component):
        return f"`{value.name}`"
    if isinstance(value, str) and not value:
        return "empty"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, Mapping):
        return "`{}`" if not value else f"`{dict(value)}`"
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return f"`{float(f'{value:.4g}') if isinstance(value, float) else value}`"


def _kind_of_value(option: Option) -> str:
    """Return, in parentheses, what values an option takes, where its default and its help do not say it."""
    choices = [str(value) for value in get_args(option.type)] if get_origin(option.type) is Literal else []
    told = all(f"``{value}``" in option.help for value in choices) if choices else option.default not in (None, (), "")
    words = _words(option.type)
    return f"({words}) " if words and (option.required or not told) else ""


def _words(kind: Any, *, several: bool = False) -> str:
    """Return what values of a type are, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        named = [_words(one) for one in args if one is not type(None)]
        return " or ".join([*(n for n in named if n), *(["null"] if type(None) in args else [])])
    if origin is tuple:
        return f"list of {_words(args[0], several=True)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    plain: dict[Any, str] = {int: "whole number", float: "number", str: "text", Component: "component"}
    return f"{plain[kind]}{'s' if several else ''}" if kind in plain else ""
