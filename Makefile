# `make demo` runs the main job on data that comes along; `make test` runs the tests. Each installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1

.PHONY: demo test test-slow test-small-cpus lint readme clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/demo.py --seed $(SEED)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

# What computes differently on a smaller CPU, tested as on one with AVX2 at most, then on one without AVX: a fast path
# that the CPU lacks must fall back to the plain one and give equal results. The variables hold back the kernels of
# PyTorch (ATEN), oneDNN and MKL. They cannot imitate a small CPU's speed, nor hold back code that does not read them
# (fbgemm, which int8 layers use; NumPy; safetensors), nor add AVX512 or AMX to a CPU that lacks them.
SMALL_CPU_TESTS := tests/model tests/inference/test_packed.py tests/inference/test_decoder.py \
	tests/inference/test_generate.py tests/training/engines/test_torch_engine.py tests/training/test_loop.py \
	tests/test_configs.py tests/examples/demo/test_demo.py
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SSE4 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

test-small-cpus: $(VENV)/.dev
	$(AVX2) $(BIN)/python -m pytest -q -n 2 --dist loadfile $(SMALL_CPU_TESTS)
	$(SSE4) $(BIN)/python -m pytest -q -n 2 --dist loadfile $(SMALL_CPU_TESTS)

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
