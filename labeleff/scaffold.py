"""``labeleff new``: the three files that a strategy of one's own begins with."""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import sys
from pathlib import Path

from labeleff.errors import RecipeError
from labeleff.files import write_atomically
from labeleff.index import PATH as INDEX

STRATEGY = '''"""The strategy {name}, to be made your own: labelled images teach, unlabelled ones ask for decided predictions."""

from labeleff import StepOutput, Strategy, Stream, register
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.sfda import weighted_entropy


@register("strategy", "{name}")
class {title}(Strategy):
    """L = L_sup(labelled) + w H(unlabelled), where H is the mean entropy of a prediction, nats.

    Args:
        weight: Weight w of the entropy.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def streams(self):
        return {{"labelled": Stream("labelled"), "unlabelled": Stream("unlabelled")}}

    def step(self, backbone, batch, progress):
        given, other = batch["labelled"], batch["unlabelled"]
        supervised = segmentation_loss(backbone(given.image), given.label)
        entropy = weighted_entropy(backbone(other.image), valid=other.valid)  # padding counts nowhere
        return StepOutput({{"supervised": supervised, "entropy": self.weight * entropy}})
'''

RECIPE = """# {name} beside the labels alone, on generated patients: a minute, no data. Then: data.dataset of your own.
# labeleff run {recipe} --plugin {file}
name: {name}
data:
  dataset: {{name: phantom, patients: 12, test: 4, size: [48, 48], slices: 4}}
  labelled: 2
  patch: [48, 48]
backbone: {{name: unet, channels: [8, 16, 32]}}
stages:
  - strategy: {{name: {name}, weight: 0.1}}
    steps: 200
    batch: 4
    augment: {{rotate: 20, scale: 0.15, shift: 0.1}}
baseline:
  - strategy: supervised
    steps: 200
    batch: 4
    augment: {{rotate: 20, scale: 0.15, shift: 0.1}}
"""

TEST = '''"""What every strategy promises, kept by {name}: python -m pytest {test}"""

import pytest
from {name} import {title}

from labeleff.testing import Subject, checks


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.__name__)
def test_contract(check):
    check(Subject({title}))
'''


def new_strategy(name: str, folder: Path) -> list[str]:
    """Write ``NAME.py``, ``NAME.yaml`` and ``test_NAME.py``, and return what to do with them, line by line.

    Raises:
        RecipeError: The name cannot be one, means something already, or one of the files is there.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise RecipeError(f"{name!r} cannot name a strategy: use lower-case letters, digits and underscores")
    files = {f"{name}.py": STRATEGY, f"{name}.yaml": RECIPE, f"test_{name}.py": TEST}
    for file in files:
        if (folder / file).exists():
            raise RecipeError(f"{folder / file}: is there already; give another name, or another --folder")
    if name in json.loads(INDEX.read_text())["strategy"]:
        raise RecipeError(f"{name!r} is a strategy of labeleff; give another name")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise RecipeError(f"{name!r} is the name of a Python module, which {name}.py would hide; give another one")
    title = "".join(part.capitalize() for part in name.split("_"))
    words = {"name": name, "title": title, "recipe": f"{name}.yaml", "file": f"{name}.py", "test": f"test_{name}.py"}
    for file, text in files.items():
        write_atomically(folder / file, text.format(**words))
    return [
        f"{folder / f'{name}.py'}: the strategy; its options are the arguments of __init__",
        f"try it: labeleff run {folder / f'{name}.yaml'} --plugin {folder / f'{name}.py'}",
        f"what it must keep: python -m pytest {folder / f'test_{name}.py'}",
    ]
