# Everything on a fresh machine: `make demo`, then `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := 1

.PHONY: help demo test slow exhaustive lint types smoke check clean
help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train a semi-supervised method beside its baseline, print a table, write pictures
	$(BIN)/labeleff run quickstart --folder runs/quickstart

test: $(STAMP) ## the test suite (what the tests of a file share is made once: a file goes to one process)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

slow: $(STAMP) ## tests that take minutes each
	$(BIN)/python -m pytest -n 2 -m "slow and not exhaustive"

exhaustive: $(STAMP) ## the slow tests that are left out there: before a release
	$(BIN)/python -m pytest -n 2 -m exhaustive

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## static types of the package
	$(BIN)/mypy

smoke: $(STAMP) ## every shipped recipe, two steps per stage
	$(BIN)/python -m pytest -n 2 tests/smoke

check: lint types test ## all of the above but the slow ones (the recipes are among the tests)

clean: ## remove what make made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
