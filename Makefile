# The two commands of a newcomer: `make demo` and `make test`. Each sets up .venv/ itself, once.

VENV := .venv
PYTHON := $(VENV)/bin/python
# New constraints or a new pyproject.toml make a new stamp, and so a new installation; nothing else does.
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml | cksum | cut -d ' ' -f 1)

.PHONY: setup demo test test-slow coverage-table check clean

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@scripts/setup.sh $(VENV)
	@touch $(STAMP)

demo: setup
	@$(PYTHON) -m megatron_hbp.demo

# Two files at a time: most of a launch's first seconds are one process's imports, and a second core waits.
test: setup
	@$(PYTHON) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: setup
	@$(PYTHON) -m pytest -m slow

coverage-table: setup
	@$(PYTHON) -m tests.equivalence.support.coverage

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/hadolint Dockerfile
	@$(VENV)/bin/shellcheck scripts/*.sh scripts/slurm/*.sbatch recipes/*.sh .ci/run

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
