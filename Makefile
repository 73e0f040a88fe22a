# `make study` and `make test` need Python 3.11 or newer and make; they create .venv on first use.
# Another environment (conda, a container) is used with `make study BIN=/path/to/its/bin`: then nothing is installed.
PYTHON ?= python3
PRESET ?= quick
STUDIES := overview mmunlearner manu null_space_cvf pulse robustness audit
README ?= README.md
BIN := .venv/bin
READY := $(if $(filter .venv/bin,$(BIN)),.venv/.stamp)

# Idle OpenMP threads must not spin: with the default, parallel workers on two cores are 20 to 50 times slower.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# An environment that is not .venv need not have this package installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help study studies test pytest notebooks readme export clean-notebooks lab

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

study: $(READY) ## make a world, train, unlearn with every method, score, draw the figures (PRESET=smoke|quick|full)
	$(BIN)/python -m mmu_study.cli study overview --preset $(PRESET)

studies: $(READY) ## the overview, a page for every paper and protocol, and the audit of released code (PRESET as above)
	$(BIN)/python -m mmu_study.cli study $(STUDIES) --preset $(PRESET)

test: $(READY) ## all tests, those in tests/ and the notebooks side by side
	$(MAKE) --no-print-directory -j2 pytest notebooks

pytest: export HF_HUB_OFFLINE = 1
pytest: $(READY) ## the tests in tests/
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

notebooks: export HF_HUB_OFFLINE = 1
notebooks: export OMP_NUM_THREADS = 1
notebooks: $(READY) ## run every notebook; its cells hold the unit tests
	@# studies take minutes each: `mmu-study study NAME` runs them, and tests execute the run pages
	$(BIN)/nbdev-test nbs --n-workers 2 --timing --cell-timeout 1800 --skip-folder-re '^([_.]|studies$$)'

readme: $(READY) ## write README.md from nbs/index.ipynb
	@# cells marked `#| hide` are left out, so are directives; links that lead from nbs/ to the root lead from the root
	sed 's/"kernelspec": {/"language_info": {"name": "python"}, &/' nbs/index.ipynb \
	| $(BIN)/jupyter-nbconvert --log-level ERROR --to markdown --stdin --stdout --RegexRemovePreprocessor.patterns='#\| *(hide|default_exp)' \
	| sed -E -e '/^#\| /d' -e 's#(\]\(|src="|href=")\.\./#\1#g' -e 's/[[:space:]]+$$//' | cat -s > $(README).partial
	@mv $(README).partial $(README)

export: $(READY) ## write mmu_study/ from the notebooks
	$(BIN)/nbdev-export

clean-notebooks: $(READY) ## remove metadata and counters from the notebooks, keep their outputs
	$(BIN)/nbdev-clean

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'mmu_study needs Python 3.11 or newer, and "$(PYTHON)" is not; name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo 'Installing $(shell grep -c == requirements.lock) packages into .venv: a few minutes, once.'
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
