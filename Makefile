# Every target sets up what it needs in .venv, so a fresh clone needs nothing before `make demo`.

PYTHON ?= python3
WORKERS ?= 3# test processes: one more than two cores, as some tests wait; each gets neighbours (worksteal), which share fixtures
BENCH ?= train# or memory, decode, widths, compute, quality, probes, serve, busy, gpu, replay
TORCH := 2.13.0# pinned by `make constraints`; pyproject.toml has the versions that work

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export GOMP_SPINCOUNT ?= 10000# as the command sets it (src/perceiver_ar/threads.py)

# Stops if $(PYTHON) is missing or too old.
require_python = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: PYTHON=$(PYTHON) is not \
  Python 3.11 or newer; name one that is, as in: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }

# Builds site/ from scratch, since deleted pages would stay. Fails at any other line in the log: --strict does not count
# what mkdocstrings and griffe log.
define build_site
	@rm -rf site; log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	$(BIN)/zensical build --clean --strict > "$$log" 2>&1; status=$$?; cat "$$log"; \
	test $$status = 0 && ! grep -qvE '^(Build started|No issues found|Build finished in .*|)$$' "$$log"
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test quick check docs benchmark constraints clean

help:  ## this list
	@echo 'make TARGET [PYTHON=python3.12] [WORKERS=4], where TARGET is'
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/.ready  ## train a small model on Python's own source for three minutes, measure it, generate
	rm -rf runs/demo
	$(BIN)/perceiver-ar train --config recipes/demo.yaml --out runs/demo
	$(BIN)/perceiver-ar evaluate runs/demo --context_lengths 16,64,256,1024 --max_tokens 40000
	$(BIN)/perceiver-ar generate runs/demo --prompt_file src/perceiver_ar/windows.py --keep 600 --max_new_tokens 300 \
		--ignore_end --seed 1

test: .venv/.ready  ## all tests but the slow ones; ARGS='-m slow' or ARGS=tests/test_files.py go to pytest
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

QUICK := attention config files kernels layering lock objective optim windows generation/cache generation/sampling data/codec \
  data/midi_file data/text model
quick: .venv/.ready  ## within a minute: the tests of the network, its parts and the settings
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(foreach name,$(QUICK),tests/$(dir $(name))test_$(notdir $(name)).py) $(ARGS)

check: .venv/.ready  ## lint, format, types, and the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(build_site)

docs: .venv/.ready  ## the documentation as pages in site/, without network
	$(BIN)/python docs/make_reference.py
	$(build_site)

benchmark: .venv/.bench  ## speed and quality beside others; BENCH=train, memory, decode, widths, compute, quality, probes, serve, busy, gpu or replay, ARGS go to the benchmark
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

constraints:  ## resolve the newest versions that pyproject.toml allows and pin them in constraints.txt
	$(require_python)
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/pip" install torch==$(TORCH) --editable '.[dev,bench]'; \
	"$$fresh/bin/pip" freeze --all --exclude-editable > "$$fresh/all"; \
	{ echo '# The versions that make sets up. Written by `make constraints`; commit them when `make check test` passes.'; \
	  echo '# Without the CUDA libraries and triton: torch needs them on some platforms only, and pins them itself.'; \
	  sed -E 's/\+[A-Za-z0-9.]+$$//; /^(pip=|nvidia-|cuda-|triton)/d' "$$fresh/all"; \
	} > "$$fresh/constraints.txt"; \
	if grep -n '@' "$$fresh/constraints.txt"; then echo 'make: these were not taken from an index' >&2; exit 1; fi; \
	cp "$$fresh/constraints.txt" constraints.txt

clean:  ## remove .venv and caches; runs/ stays
	rm -rf .venv dist site .cache .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./.git -o -path ./runs \) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# An interrupted set-up may leave half a package, which pip takes for a whole one: the next set-up starts from scratch.
# The stamp has the time at which the set-up began, so that an edit of pyproject.toml in the meantime counts.
.venv/.ready: pyproject.toml constraints.txt
	$(require_python)
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@mv .venv/.unfinished $@

.venv/.bench: .venv/.ready
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	@touch $@
