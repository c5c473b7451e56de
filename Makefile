# Everything is installed in the checkout, except for Debian packages (python3-venv, services and
# clients for the tests). Those are installed only as root.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check
COMPOSE := docker compose
LOCK := .venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --upgrade pyproject.toml --extra tracing
# Most tests wait more than they compute, so five processes help even on two cores.
PYTEST := .venv/bin/python -m pytest --numprocesses 5 --dist worksteal

# Of `make mutants`; a large module with slow tests takes half an hour. The unit tests mirror the folders
# of the code.
PATHS ?= worker/routing.py worker/leader.py
MUTANT_TESTS ?= $(foreach path,$(PATHS),$(or $(wildcard $(dir tests/unit/$(path))test_$(basename $(notdir $(path)))*.py),$(dir tests/unit/$(path))))

.DEFAULT_GOAL := help
.PHONY: help run test check types language coverage mutants format up down test-versitygw test-cluster e2e faults chaos fuzz bench bench-guard bench-relay bench-parts bench-tracing screenshots lock release clean

help: ## list all targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: .venv/.ready ## run API and worker in one process
	@.venv/bin/stowgate run

test: .venv/.ready-dev ## run every test that this machine can run
	@$(PYTEST) $(TESTS)

check: .venv/.ready-dev ## check format, lint, types and spelling, then run the tests
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	$(MAKE) --no-print-directory types language test

# Folders of tests have modules of the same names, so each is checked by itself.
types: .venv/.ready-dev ## check the types of the code, its tests and its benchmarks
	.venv/bin/mypy
	MYPYPATH=tests .venv/bin/mypy tests/*.py benchmarks/*.py
	@set -e; for folder in cluster contract e2e faults fuzz http page release senders unit; do \
		echo "MYPYPATH=tests:tests/$$folder .venv/bin/mypy tests/$$folder"; \
		MYPYPATH=tests:tests/$$folder .venv/bin/mypy $$(git ls-files "tests/$$folder/*.py"); \
	done

language: .venv/.ready-dev ## check the spelling of docs and code
	.venv/bin/codespell

coverage: .venv/.ready-dev ## run the unit tests and report the branches they miss, above a floor
	@$(PYTEST) tests/unit --cov

mutants: .cache/mutmut/bin/mutmut ## PATHS=worker/relay.py: list small changes of the code that no test beside it notices
	@rm -rf .cache/mutants && mkdir -p .cache/mutants
	@cp -RL api cli shared worker tests pyproject.toml .cache/mutants
	@printf '\n[tool.mutmut]\n%s = [%s]\n%s = [%s]\n%s\n%s\n%s\n' \
		source_paths '$(PATHS:%="%",)' pytest_add_cli_args_test_selection '$(MUTANT_TESTS:%="%",)' \
		'also_copy = ["api", "cli", "shared", "worker", "tests"]' \
		'pytest_add_cli_args = ["-k", "not memory"]' \
		"do_not_mutate_patterns = ['_log\.', '_JSON']" >> .cache/mutants/pyproject.toml
	@cd .cache/mutants && { ../mutmut/bin/mutmut run > run.log 2>&1 || { tail -c 2000 run.log; exit 1; }; }
	@cd .cache/mutants && ../mutmut/bin/mutmut results
	@echo "In .cache/mutants, ../mutmut/bin/mutmut show NAME prints a change."

# Apart from .venv: it brings setproctitle, with which gunicorn empties the environment of its processes,
# and tests look at that.
.cache/mutmut/bin/mutmut: requirements-dev.lock .venv/.ready-dev
	@.venv/bin/python -m venv .cache/mutmut
	@.cache/mutmut/bin/pip install --quiet --require-hashes --requirement requirements-dev.lock
	@.cache/mutmut/bin/pip install --quiet "mutmut==3.8.1"
	@.cache/mutmut/bin/pip install --quiet --no-deps --editable .
	@touch $@

format: .venv/.ready-dev ## format the code
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

up: ## start the compose stack
	$(COMPOSE) up --build --detach --wait
	@echo "Stowgate listens on http://$$($(COMPOSE) port nginx 80); make down stops it"

down: ## stop the compose stack; keep its volumes
	$(COMPOSE) down

test-versitygw: .venv/.ready-dev ## run contract and fault tests with VersityGW instead of MinIO
	@STOWGATE_TEST_OBJECT_STORE=versitygw $(MAKE) --no-print-directory test faults TESTS=tests/contract

test-cluster: .venv/.ready-dev ## kill each of three RabbitMQ nodes under load; needs Docker
	@.venv/bin/python -m pytest tests/cluster -s

e2e: .venv/.ready-dev ## STORE=minio: run end-to-end tests on a temporary compose stack
	@STORE=$(STORE) .venv/bin/python -m pytest tests/e2e

# These compute more, with a service or two in each; five processes take no less time.
faults: .venv/.ready-dev ## run the fault tests, on real processes
	@$(PYTEST) --numprocesses 3 tests/faults

chaos: .venv/.ready-dev ## POSTS=10000 SEED=n: kill processes at random while senders send
	@PYTHONPATH=tests .venv/bin/python tests/faults/chaos.py --posts $(or $(POSTS),1000) $(if $(SEED),--seed $(SEED)) \
		$(if $(SENDERS),--senders $(SENDERS))

fuzz: .venv/.ready-dev ## N=1000000 SEED=n: test with random hostile input and the worst known files
	@PYTHONPATH=tests .venv/bin/python tests/fuzz/run.py --cases $(or $(N),50000) $(if $(SEED),--seed $(SEED))
	@PYTHONPATH=tests .venv/bin/python tests/fuzz/worst.py

screenshots: .venv/.ready-dev ## take the screenshots of the operator's page for the docs; needs Chromium
	@PYTHONPATH=tests .venv/bin/python tests/page/screenshots.py

lock: .venv/.ready-dev ## update the lock files
	$(LOCK) --output-file requirements.lock
	$(LOCK) --group dev --output-file requirements-dev.lock
	$(LOCK) --group dev --group bench --output-file requirements-bench.lock
	$(LOCK) --group dev --group release --output-file requirements-release.lock

# The time of the commit, and not that of the build, is in the archives.
release: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
release: VERSION = $(shell .venv/bin/python -c 'from importlib.metadata import version as v; print(v("stowgate"))')
release: .venv/.ready-release ## build wheel, sdist, bill of materials and image, and check them; needs Docker
	@[ -z "$$(git status --porcelain)" ] || \
		{ echo "a release is built from a commit: commit or stash what git status shows" >&2; exit 1; }
	@rm -rf dist .cache/release && mkdir -p .cache/release
	@git archive HEAD | tar --extract --directory .cache/release
	.venv/bin/uv build --quiet --out-dir dist .cache/release
	.venv/bin/twine check --strict dist/*.whl dist/*.tar.gz
	PYTHONWARNINGS=ignore .venv/bin/cyclonedx-py requirements --validate --output-reproducible \
		--pyproject pyproject.toml --output-file dist/stowgate-$(VERSION).cdx.json requirements.lock
	docker build --quiet --target stowgate --tag stowgate:$(VERSION) .
	.venv/bin/python -m pytest tests/release
	@cd dist && sha256sum stowgate-* > SHA256SUMS
	@echo "checked: image stowgate:$(VERSION), and in dist/:" && cat dist/SHA256SUMS

bench: .venv/.ready-bench ## ROUNDS=3: measure performance, compared with the store's limit and Orthanc
	@PYTHONPATH=tests .venv/bin/python benchmarks/bench.py --write --rounds $(or $(ROUNDS),3)

bench-guard: .venv/.ready-dev ## fail if performance has fallen since the last bench
	@PYTHONPATH=tests .venv/bin/python benchmarks/guard.py

bench-relay: .venv/.ready ## measure a pass of the relay with many records
	@PYTHONPATH=tests .venv/bin/python benchmarks/relay.py $(ARGS)

bench-parts: .venv/.ready-dev ## measure the memory that many small parts need
	@PYTHONPATH=tests .venv/bin/python benchmarks/parts.py $(ARGS)

bench-tracing: .venv/.ready-dev ## measure what tracing costs, off and on
	@PYTHONPATH=tests .venv/bin/python benchmarks/tracing.py $(ARGS)

clean: ## remove everything that was installed; keep the data
	rm -rf .venv .cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Stowgate needs Python 3.11 or newer: set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "installing python3-venv, which Debian packages separately" && \
		apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv >/dev/null && \
		$(PYTHON) -m venv .venv; } || { rm -rf .venv; \
		echo "python3 -m venv failed: install the venv module of Python (Debian: apt install python3-venv)" >&2; \
		exit 1; }

.venv/.ready: requirements.lock pyproject.toml | .venv/bin/python
	@echo "setting up .venv (first run only)"
	@$(PIP) install --require-hashes --requirement requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

.venv/.ready-dev: requirements-dev.lock .venv/.ready
	@echo "installing the test tools (first run only)"
	@$(PIP) install --require-hashes --requirement requirements-dev.lock
	@touch $@

# For `make bench` and `make release`.
.venv/.ready-%: requirements-%.lock .venv/.ready-dev
	@echo "installing the tools of make $* (first run only)"
	@$(PIP) install --require-hashes --requirement $<
	@touch $@
