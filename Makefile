# `make demo` runs the main job on data that comes along; `make test` runs the tests. Each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1

.PHONY: demo test test-slow lint readme clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --seed $(SEED)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What README.md shows of the demonstration; LOG=FILE takes what `make demo` printed instead of running it again.
readme: $(VENV)/.demo
	$(BIN)/python docs/regenerate.py $(if $(LOG),--log $(LOG))

$(VENV)/.demo: EXTRA := plot
$(VENV)/.dev: EXTRA := dev
$(VENV)/.demo $(VENV)/.dev: setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing minigpt[$(EXTRA)] into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
