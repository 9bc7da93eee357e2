"""The code in the pages runs, and the pages tell the truth about results."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import yaml

from labeleff import registry
from labeleff.recipe_io import load_recipe

from .test_resume import IN_FOUR_STAGES

ROOT = Path(__file__).parent.parent


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_strategy_of_the_guide_passes_its_contract(tmp_path, own_registry):
    script = tmp_path / "cross_teaching.py"
    script.write_text("\n".join(blocks("add_a_strategy.md", "python")))
    runpy.run_path(str(script), run_name="__main__")
    assert "cross_teaching" in registry.names("strategy")


def test_the_recipe_of_the_page_is_valid():
    (text,) = blocks("recipes.md", "yaml")
    recipe = load_recipe(yaml.safe_load(text.replace("4.0e-3", "0.004")))
    assert recipe.stages[1].streams["unlabelled"].batch == 8


def test_the_page_of_four_stages_shows_the_recipe_and_where_it_is_killed():
    page = (ROOT / "docs" / "four_stages.md").read_text()
    (text,) = blocks("four_stages.md", "yaml")
    shown = load_recipe(yaml.safe_load(text))
    assert shown == load_recipe("phantom/four_stages")
    told = [place for row in re.findall(r"^\| [\w -]+ \| (.*) \|$", page, re.MULTILINE) for place in row.split("; ")]
    assert [place for place in told if place in IN_FOUR_STAGES] == list(IN_FOUR_STAGES)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_of_results_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
