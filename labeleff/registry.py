"""Names to code. A recipe names what is registered; it can never name a Python path.

Our own package is discovered by importing its modules; installed plug-ins by the entry-point group
``labeleff.plugins``; a file by ``--plugin FILE`` on the command line, never from a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import metadata
from typing import Any, Literal, Protocol, TypeVar, get_type_hints

from labeleff.errors import RecipeError, did_you_mean

Kind = Literal["strategy", "annotator", "backbone", "dataset", "noise", "prior"]
PACKAGES: Mapping[str, str] = {
    "strategy": "labeleff.strategies",
    "annotator": "labeleff.annotators",
    "backbone": "labeleff.backbones",
    "dataset": "labeleff.data.formats",
    "noise": "labeleff.data.noise",
    "prior": "labeleff.data.priors",
}
_registered: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in PACKAGES}
_discovered: set[str] = set()
_plugins_loaded = False
T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Component:
    """A registered name and its options (``{name: bcp, decay: 0.95}`` in YAML).

    As the type of an option it names another component of the same kind: a data set that is made of data sets.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One option of a component, read off its constructor."""

    name: str
    type: Any
    default: Any  # inspect.Parameter.empty where there is none
    help: str

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is inspect.Parameter.empty


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Return a decorator that registers a class (or a factory function) under a name.

    Raises:
        RecipeError: The name is taken, is not a lower-case word, or the constructor takes positional options.
    """

    def decorate(factory: T) -> T:
        if kind not in _registered:
            raise RecipeError(f"cannot register {name!r}: unknown kind {kind!r}.{did_you_mean(kind, PACKAGES)}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise RecipeError(f"cannot register {kind} {name!r}: use lower-case letters, digits and underscores")
        known = _registered[kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
            raise RecipeError(f"{kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}")
        for option in inspect.signature(factory).parameters.values():
            # a class without an __init__ of its own has that of nn.Module, (*args, **kwargs): no options
            if kind != "backbone" and option.kind in (option.POSITIONAL_ONLY, option.POSITIONAL_OR_KEYWORD):
                raise RecipeError(f"{kind} {name!r}: option {option.name!r} must be keyword-only (put * before it)")
        _registered[kind][name] = factory
        return factory

    return decorate


def discover(kind: str) -> None:
    """Import every module of our own package of that kind, once. Import errors are raised, never swallowed."""
    if kind in _discovered:
        return
    package = importlib.import_module(PACKAGES[kind])
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    _discovered.add(kind)


def _load_plugins() -> None:
    """Import installed plug-ins. What the user has installed is trusted; what a recipe says is not."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in metadata.entry_points(group="labeleff.plugins"):
            entry.load()


def names(kind: Kind) -> list[str]:
    """Return the registered names of a kind, sorted."""
    discover(kind)
    _load_plugins()
    return sorted(_registered[kind])


def get(kind: Kind, name: str) -> Callable[..., Any]:
    """Return what is registered under a name.

    Raises:
        RecipeError: Nothing is.
    """
    discover(kind)
    if name not in _registered[kind]:
        _load_plugins()
    if name not in _registered[kind]:
        known = sorted(_registered[kind])
        raise RecipeError(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return _registered[kind][name]


def options(factory: Callable[..., Any]) -> dict[str, Option]:
    """Return the keyword-only options of a class or factory, with types, defaults and help from its docstring."""
    if inspect.isclass(factory) and not is_dataclass(factory):
        return {name: option for part in _constructors(factory) for name, option in _own_options(part, factory).items()}
    return _own_options(factory, factory)


def _constructors(factory: type) -> Iterator[type]:
    """Yield the classes whose constructors the options of a class go to: with ``**more``, those it derives from too."""
    for part in inspect.getmro(factory):
        if "__init__" in vars(part):
            yield part
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(vars(part)["__init__"]).parameters.values()):
                return


def _own_options(factory: Callable[..., Any], documented: Callable[..., Any]) -> dict[str, Option]:
    # inherited fields are spelt in the words of the module of their class, which only the class knows
    own = fields(factory) if is_dataclass(factory) and isinstance(factory, type) else ()
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) and not own else factory)
    texts: dict[str, str] = {}
    for part in reversed(inspect.getmro(documented)) if inspect.isclass(documented) else (documented,):
        texts |= _argument_texts(inspect.cleandoc(part.__doc__ or ""))  # options may be inherited
    made = {f.name: f.default_factory() for f in own if f.default_factory is not MISSING}
    return {
        parameter.name: Option(
            parameter.name,
            hints.get(parameter.name, Any),
            made.get(parameter.name, parameter.default),
            texts.get(parameter.name, ""),
        )
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _argument_texts(doc: str) -> dict[str, str]:
    """Read the ``Args:`` section of a Google-style docstring."""
    texts: dict[str, str] = {}
    current, inside = "", False
    for line in doc.splitlines():
        if re.fullmatch(r"\s*(Args|Arguments):\s*", line):
            inside = True
        elif inside and line.strip() and not line.startswith("    "):
            inside = False
        elif inside and (found := re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)):
            current = found[1]
            texts[current] = found[2].strip()
        elif inside and current and line.strip():
            texts[current] += " " + line.strip()
    return texts


def build(kind: Kind, name: str, **chosen: Any) -> Any:
    """Construct a registered component from checked options.

    Raises:
        RecipeError: Unknown name or option, missing option, or a value out of range (a ``ValueError`` of the constructor).
    """
    factory = get(kind, name)
    known = options(factory)
    for key in chosen:
        if key not in known:
            raise RecipeError(
                f"{kind} {name!r} has no option {key!r}.{did_you_mean(key, known)} It has: {', '.join(known) or 'none'}"
            )
    missing = [key for key, option in known.items() if option.required and key not in chosen]
    if missing:
        raise RecipeError(f"{kind} {name!r} needs the option {missing[0]!r}: {known[missing[0]].help}")
    try:
        return factory(**chosen)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{kind} {name!r}: {error}") from error


class Named(Protocol):
    """A component as a recipe names it."""

    @property
    def name(self) -> str:
        """Under which it is registered."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """What was chosen of its options."""
        ...


def made(kind: Kind, component: Named) -> Any:
    """Construct what a recipe names; see :func:`build`."""
    return build(kind, component.name, **component.options)
