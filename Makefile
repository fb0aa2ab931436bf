# Two commands do everything, set-up included: `make figures` and `make test`.
# Another Python: make figures PYTHON=python3.12. More for pip: make figures PIP_ARGS="--extra-index-url https://..."
# The newest versions of everything in place of the tested ones: make test CONSTRAINTS=/dev/null

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help figures test test-all reliability check-sync lint lab export docs docs-check docs-browser clean

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
READY := .venv/.installed
# several notebooks are tested at once: one thread each, and no windows; modules are compiled once for all processes
QUIETLY := OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=
# a half of the tests for each process, so that what tests of a file share is made once; who is done first takes over
SHARED := -n 2 --dist worksteal

help: ## show this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r t d; do printf '  %-12s %s\n' "$$t" "$$d"; done
	@echo "Each one first sets up .venv if need be. Experiments: $(BIN)/nsq-repro --help"

figures: $(READY) ## train, attack and draw Figures 1, 2, 3 and 8 at smoke scale: minutes on two cores, no data to fetch
	@$(BIN)/nsq-repro run mnist --scale smoke

test: $(READY) check-sync ## check that modules and notebooks agree, then run the tests in nbs/ and tests/
	@echo "== notebooks: nbdev_test"
	@$(QUIETLY) $(BIN)/nbdev_test --n_workers 2 --timing
	@echo "== tests: pytest"
	@$(QUIETLY) $(BIN)/python -m pytest tests -q $(SHARED)

test-all: test ## the tests, and the slow ones: every kind of work killed thirty times
	@echo "== tests: the slow ones"
	@$(QUIETLY) $(BIN)/python -m pytest tests -q $(SHARED) -m slow

reliability: $(READY) ## run kills, bad inputs, other machines and properties, slow ones too; record the counts the page shows
	@$(QUIETLY) $(BIN)/python -m pytest tests -q $(SHARED) -m "reliability or hypothesis" --record

check-sync: $(READY) ## check that nsq_repro/ is what nbs/ exports and that the notebooks are clean; changes nothing
	@echo "== nbs/ and nsq_repro/: in sync and clean"
	@$(BIN)/python tests/check_sync.py

lint: $(READY) ## ruff over modules, notebooks and tests; pyright over modules
	@$(BIN)/ruff check
	@$(BIN)/python tests/check_types.py

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

export: $(READY) ## write nsq_repro/ from nbs/ and strip what does not belong in a committed notebook
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

docs: $(READY) ## render the site into _docs, with the Quarto that is there or else with quarto-cli from PyPI
	@export PATH="$$PATH:$(CURDIR)/$(BIN)"; quarto --version >/dev/null 2>&1 \
	  || { echo "== no Quarto here: trying PyPI's quarto-cli"; $(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[docs]' >/dev/null 2>&1; quarto --version >/dev/null 2>&1; } \
	  || { echo "No Quarto here, and quarto-cli cannot be installed: its installer fetches Quarto from github.com." >&2; \
	       echo "Install Quarto 1.4 or newer from https://quarto.org, then: make docs. The pages can be read without it: make lab" >&2; exit 1; }; \
	  $(QUIETLY) $(BIN)/nbdev_docs --n_workers 2 && echo "== the site is in _docs/index.html"

docs-check: $(READY) ## check the pages as a text: references, links, captions, citations; needs no Quarto
	@$(BIN)/python -m pytest -q tests/test_site.py tests/test_reading.py

docs-browser: $(READY) ## look at the pages (Quarto's, or else pandoc's) in headless Chromium, at two widths
	@$(BIN)/python tests/check_browser.py

clean: ## remove .venv and caches; runs/ and figures/ stay
	@rm -rf .venv _proc _docs build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find nbs nsq_repro tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here. Install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "== setting up .venv with $$($(PYTHON) -V): once, some minutes, several GB (PyTorch)"
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu its package is python3-venv" >&2; exit 1; }
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev]' \
	  | while read -r did what size; do case "$$did $$size" in "Downloading ("??*.?" MB)") echo "   $$what $$size";; Installing*) echo "   unpacking ...";; esac; done
	@mkdir -p runs && touch $@
	@echo "== .venv is ready"
