# make study [STUDY=methods] | test | bench | lab | gc [FREE=1]: each makes the environment it needs and then does its one thing.
# README has the commands without make.
PYTHON ?= python3
VENV := .venv
STUDY ?=
FREE ?=
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: study test test-long test-oldest test-oracles bench lab gc

study: $(VENV)/installed
	python -m kdlib.study run $(STUDY)

test: $(VENV)/installed
	python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-long: $(VENV)/installed
	python -m pytest -m "long or not long"

bench: $(VENV)/installed
	python benchmarks/engine.py

lab: $(VENV)/installed
	jupyter lab --notebook-dir . notebooks/explore.ipynb

gc: $(VENV)/installed
	python -m kdlib.study gc $(if $(FREE),--free)

# The stamp comes last: an installation that was interrupted is taken up again.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	@echo "installing requirements.lock: about 6.5 GB, 4 minutes on a fast line"
	python -m pip install --quiet --requirement requirements.lock
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# kdlib on the oldest torch that it supports, in an environment of its own
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -m "not long and not pipeline" --ignore tests/test_style.py

.venv-oldest/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet "torch==2.11.*" "torchvision==0.26.*" --editable ".[test]"
	touch $@

# our losses and measures beside those of other packages, in an environment of its own
test-oracles: .venv-oracles/installed
	.venv-oracles/bin/python -m pytest tests/test_oracles.py

.venv-oracles/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip install --quiet --upgrade pip
	.venv-oracles/bin/python -m pip install --quiet --requirement requirements.lock
	.venv-oracles/bin/python -m pip install --quiet --no-build-isolation --editable ".[oracles]"
	touch $@
