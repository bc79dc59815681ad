# For a machine with Python 3.11 or newer and make; everything else is installed into .venv.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
NODE_FOLDERS := tests/contract deploy/examples
NODE_PACKAGES := $(NODE_FOLDERS:%=%/node_modules/.installed)
DBT_VERSIONS := $(patsubst tests/dbt-versions/%.txt,%,$(wildcard tests/dbt-versions/*.txt))

# Every dbt that is started from here, and stays quiet about it.
export DBT_SEND_ANONYMOUS_USAGE_STATS := 0

.PHONY: demo telemetry-demo test lint schemas dashboards node-packages prometheus receivers
.PHONY: test-dbt-versions test-faults bench constraints clean

demo: $(VENV)/.installed  ## A sample project, from request to events.
	$(BIN)/dbtstream demo

telemetry-demo: prometheus  ## The sample project in five ways: a trace, and what every panel says.
	$(BIN)/python -m tests.telemetry_demo

test: lint node-packages prometheus receivers  ## What CI runs.
	$(BIN)/python -m pytest --ignore=tests/bench

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schemas: $(VENV)/.installed-dev  ## Write schemas/ anew; read the difference before it goes in.
	$(BIN)/dbtstream schema --output schemas

dashboards: $(VENV)/.installed-dev  ## Write deploy/grafana/dashboards anew, from the code beside it.
	$(BIN)/python -m deploy.grafana.source

# From Debian's packages where there are none, without installing them: see tests/prometheus.py.
prometheus: $(VENV)/.installed-dev  ## prometheus, promtool and amtool, for dashboards and alerts.
	@$(BIN)/python -m tests.prometheus

node-packages: $(NODE_PACKAGES)  ## For the tests that read schemas/ and the examples with Node.

receivers: .venvs/ddapm/.installed  ## A receiver of OTLP that is not ours, in an environment of its own.

test-dbt-versions: $(DBT_VERSIONS:%=test-dbt-%)  ## The child on every dbt that we support.

test-dbt-%: .venvs/%/.installed $(VENV)/.installed-dev
	DBTSTREAM_TEST_PYTHON=$(CURDIR)/.venvs/$*/bin/python $(BIN)/python -m pytest tests/integration/test_dbt_child*.py

test-faults: $(VENV)/.installed-dev  ## What `make test` does of tests/faults, much longer.
	DBTSTREAM_FAULTS=long $(BIN)/python -m pytest tests/faults

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench

# Newest versions that fit pyproject.toml, as a fresh machine would get them.
constraints:
	rm -rf .venvs/constraints
	$(PYTHON) -m venv .venvs/constraints
	.venvs/constraints/bin/python $(PIP_INSTALL) -e '.[dev]'
	grep '^#' constraints.txt > constraints.txt.new
	.venvs/constraints/bin/python -m pip --disable-pip-version-check freeze --exclude-editable >> constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(NODE_FOLDERS:%=%/node_modules)
	rm -rf $(VENV) .venvs .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "dbtstream needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Stamps: installed again only when what is asked for has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

# Node itself comes with the Python packages. No script of a package is run.
%/node_modules/.installed: %/package-lock.json | $(VENV)/.installed-dev
	$(BIN)/python -m tests.node $*
	@touch $@

.PRECIOUS: .venvs/%/.installed
.venvs/%/.installed: tests/dbt-versions/%.txt
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python $(PIP_INSTALL) -r $<
	@touch $@

.venvs/%/.installed: tests/receivers/%.txt
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python $(PIP_INSTALL) -r $<
	@touch $@
