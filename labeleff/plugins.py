"""Python files that register further components; named on the command line only, never in a recipe."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from labeleff.errors import LabeleffError, RecipeError, one_line


def load_plugins(files: Iterable[Path] | None) -> None:
    """Import files that the user has named and trusts.

    Raises:
        RecipeError: There is no such file, or it fails.
    """
    for path in files or ():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise RecipeError(f"--plugin {path}: no such Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except LabeleffError:
            raise
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}", None)
            raise RecipeError(f"--plugin {path}: fails as it is imported ({reason}); --debug shows where") from error
