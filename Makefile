# Two commands: `make start` serves the built-in demo model, `make test` checks everything.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: start stop test test-faults test-cluster docs-test pictures release-check soak bench lint types clean

start: $(READY)
	@$(BIN)/mlx-launch start --demo

stop: $(READY)
	@$(BIN)/mlx-launch stop

test: lint types
	@echo "== tests"
	@$(BIN)/python -m pytest

lint: $(READY)
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@echo "== types"
	@$(BIN)/mypy

soak: $(READY)
	@$(BIN)/python tests/soak.py --minutes $(or $(MINUTES),10)

# Half an hour on two cores, and nothing else should run meanwhile.
bench: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m benchmarks

# Every command on every page; needs port 8081.
docs-test: $(READY)
	@$(BIN)/python tests/documentation.py $(PAGES)

# The README's, from real output; needs port 8081.
pictures: $(READY)
	@$(BIN)/python tests/pictures.py

# Downloads the whole set once more.
release-check: $(READY)
	@$(BIN)/python tests/release.py

# Several ranks, on loopback and on network namespaces with an ssh server; a quarter of an hour on two cores.
test-cluster: $(READY)
	@sh scripts/cluster-hosts.sh
	@$(BIN)/python -m pytest tests/cluster

test-faults: $(READY)
	@$(BIN)/python -m pytest tests/faults tests/unit/test_policy.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlx-launch needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "== setting up .venv (once; downloads a few hundred MB)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@
