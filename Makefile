# make demo: install, then train a BERT on real text and watch it get better.   make help: all targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

BENCHMARKS := step 'step --sizes' padding stream overhead ddp checkpoint probe suite interference start spectral \
  prepare 'prepare --tokenizer all-MiniLM-L6-v2' memory

.PHONY: help demo test bench test-faults soak prometheus lint format docs tutorial wheel clean
demo: $(VENV)/.demo  ## train a small BERT on real text, with probes beside it (four minutes)
	$(BIN)/raybert demo

test: $(VENV)/.dev prometheus  ## run all tests; PYTEST_ARGS='tests/unit -x' for some
	$(BIN)/python -m pytest $(or $(PYTEST_ARGS),-n 2 --no-loadscope-reorder)

# One test asks a Prometheus for every panel of the Grafana dashboard. Without it that test says so and is skipped.
prometheus:  ## install Debian's prometheus, which a test needs, when root
	@command -v prometheus > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || \
	  { echo "installing prometheus, which a test needs"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq --yes --no-install-recommends prometheus > /dev/null; } || true

test-faults: $(VENV)/.dev  ## a draw of faults, nodes that come and go, 10,000 cases of each fuzz test; SEED=n repeats
	RAYBERT_FAULTS=3 RAYBERT_FAULT_SEED=$${SEED:-$$(date +%s)} RAYBERT_FUZZ=10000 RAYBERT_SLOW=1 \
		$(BIN)/python -m pytest $(addprefix tests/faults/test_,runs.py nodes.py outage.py numbers.py fuzz.py) $(PYTEST_ARGS)

N ?= 200
soak: $(VENV)/.dev  ## N=200 faults of all kinds, all the data, then 10,000 steps that must not grow; SEED=n repeats
	RAYBERT_FAULTS=$(N) RAYBERT_FAULT_SEED=$${SEED:-$$(date +%s)} RAYBERT_OUTAGE_S=60 RAYBERT_SLOW=1 RAYBERT_SOAK=1 \
		$(BIN)/python -m pytest tests/unit/test_export.py tests/integration/test_prepare.py \
		tests/faults/test_runs.py tests/faults/test_bounded.py $(PYTEST_ARGS)

bench: $(VENV)/.bench  ## the benchmarks beside their peers, a JSON line each, kept as data; BENCHMARKS=interference for one
	@mkdir -p build; for name in $(BENCHMARKS); do \
	  out=$$($(BIN)/python -m benchmarks.$$name 2>build/bench.log) || { tail -n 20 build/bench.log; exit 1; }; \
	  printf '%s\n' "$$out" | tail -n 1 | $(BIN)/python -m benchmarks.table append || exit 1; \
	done; $(BIN)/python -m benchmarks.table

lint: $(VENV)/.dev  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev  ## write the generated pages, and build the documentation into build/site; a broken link is an error
	$(BIN)/python -m docs.scripts.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet it would not count warnings

tutorial: $(VENV)/.dev  ## run the tutorial and keep its outputs, which the site shows (three minutes)
	$(BIN)/python -m docs.scripts.tutorial

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A stamp file says which extras are installed; it is older than pyproject.toml or the constraints when they change.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing raybert into $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing raybert and what its tests need into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:  ## remove what was built, the environment and local runs
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
