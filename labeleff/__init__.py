"""labeleff: learning to segment images when labels are few, missing, noisy or from elsewhere.

Importing this module is cheap; what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

_EXPORTS = {
    "Annotator": "labeleff.annotators.base",
    "Batch": "labeleff.batch",
    "IGNORE": "labeleff.batch",
    "LabeleffError": "labeleff.errors",
    "Progress": "labeleff.batch",
    "Recipe": "labeleff.recipe",
    "StepOutput": "labeleff.batch",
    "Strategy": "labeleff.strategies.base",
    "Stream": "labeleff.batch",
    "Task": "labeleff.batch",
    "check": "labeleff.checking",
    "load_recipe": "labeleff.recipe_io",
    "register": "labeleff.registry",
    "run": "labeleff.runner",
}

if TYPE_CHECKING:
    from labeleff.annotators.base import Annotator
    from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Stream, Task
    from labeleff.checking import check
    from labeleff.errors import LabeleffError
    from labeleff.recipe import Recipe
    from labeleff.recipe_io import load_recipe
    from labeleff.registry import register
    from labeleff.runner import run
    from labeleff.strategies.base import Strategy

__all__ = [
    "IGNORE", "Annotator", "Batch", "LabeleffError", "Progress", "Recipe", "StepOutput", "Strategy", "Stream", "Task",
    "check", "load_recipe", "register", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'labeleff' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
