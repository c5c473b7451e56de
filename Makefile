# Everything is set up in the checkout. Only what Debian alone has (python3-venv, engines and clients
# of the tests) is installed beside it, and only as root.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check
COMPOSE := docker compose
# Most tests wait more than they compute, so three at a time also help where there are two cores.
PYTEST := .venv/bin/python -m pytest --numprocesses 3 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help run test check format up down e2e faults chaos fuzz bench bench-guard bench-relay bench-parts lock clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

run: .venv/.ready ## start API and worker here, in one process
	@.venv/bin/stowgate run

test: .venv/.ready-dev ## run every test that this machine can run
	@$(PYTEST) $(TESTS)

check: .venv/.ready-dev ## format, lint, types, then the tests
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	$(MAKE) --no-print-directory test

format: .venv/.ready-dev ## format the code
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

up: ## start the compose stack
	$(COMPOSE) up --build --detach --wait
	@echo "Stowgate listens on http://$$($(COMPOSE) port nginx 80); make down stops it"

down: ## stop the compose stack; its volumes stay
	$(COMPOSE) down

e2e: .venv/.ready-dev ## the compose stack, end to end, torn down after
	@.venv/bin/python -m pytest tests/e2e

faults: .venv/.ready-dev ## what must hold when things break, on real processes
	@$(PYTEST) tests/faults

chaos: .venv/.ready-dev ## POSTS=10000 SEED=n: kill everything at random while senders send
	@PYTHONPATH=tests .venv/bin/python tests/faults/chaos.py --posts $(or $(POSTS),1000) $(if $(SEED),--seed $(SEED)) \
		$(if $(SENDERS),--senders $(SENDERS))

fuzz: .venv/.ready-dev ## N=1000000 SEED=n: random hostile input, and the worst files we know
	@PYTHONPATH=tests .venv/bin/python tests/fuzz/run.py --cases $(or $(N),50000) $(if $(SEED),--seed $(SEED))
	@PYTHONPATH=tests .venv/bin/python tests/fuzz/worst.py

lock: .venv/.ready-dev ## write the lock files anew
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --upgrade \
		pyproject.toml --output-file requirements.lock
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --upgrade \
		pyproject.toml --group dev --output-file requirements-dev.lock
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --upgrade \
		pyproject.toml --group dev --group bench --output-file requirements-bench.lock

bench: .venv/.ready-bench ## ROUNDS=3: how fast it is, beside its store's limit and beside Orthanc
	@PYTHONPATH=tests .venv/bin/python benchmarks/bench.py --write --rounds $(or $(ROUNDS),3)

bench-guard: .venv/.ready-dev ## whether it is still as fast, beside the same, as when last measured
	@PYTHONPATH=tests .venv/bin/python benchmarks/guard.py

bench-relay: .venv/.ready ## what a pass of the relay costs with many records
	@PYTHONPATH=tests .venv/bin/python benchmarks/relay.py $(ARGS)

bench-parts: .venv/.ready-dev ## what memory many small parts cost
	@PYTHONPATH=tests .venv/bin/python benchmarks/parts.py $(ARGS)

clean: ## remove what was set up; the data stays
	rm -rf .venv .cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Stowgate needs Python 3.11 or newer: make PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "installing python3-venv, which Debian keeps apart from Python" && \
		apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv >/dev/null && \
		$(PYTHON) -m venv .venv; } || { rm -rf .venv; \
		echo "python3 -m venv fails: install Python's venv module (Debian: apt install python3-venv)" >&2; \
		exit 1; }

.venv/.ready: requirements.lock pyproject.toml | .venv/bin/python
	@echo "setting up .venv, once"
	@$(PIP) install --require-hashes --requirement requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

.venv/.ready-dev: requirements-dev.lock .venv/.ready
	@echo "setting up the tools of the tests, once"
	@$(PIP) install --require-hashes --requirement requirements-dev.lock
	@touch $@

.venv/.ready-bench: requirements-bench.lock .venv/.ready-dev
	@echo "setting up what draws the plots, once"
	@$(PIP) install --require-hashes --requirement requirements-bench.lock
	@touch $@
