# `make test PYTHON=.venv/bin/python` runs a target with another interpreter.
PYTHON ?= python

.PHONY: style quality test test-slow ci

# Formats the code and repairs what the linter can repair.
style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Checks without changing anything: lint, format, types. The pre-commit hook and .ci/run call this target.
quality:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

# Whole training runs, crash tests and large sizes; the limit per test is longer than the default one.
test-slow:
	$(PYTHON) -m pytest -m slow -n 2 --timeout=1800

# Everything, in fresh environments, as on the build machine.
ci:
	bash .ci/run
