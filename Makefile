# `make demo` runs the main job on this machine, `make test` runs every check and test. Both set up .venv by
# themselves and need nothing but a POSIX shell, make and Python 3.11 or newer (PYTHON=... says which one).

RUN = .venv/bin/python -m
# More workers than these would mostly import torch.
PARALLEL = -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test coverage check mypy pyright public-types sync fix bench chaos fuzz soak lock dist release docs site

demo: .venv/installed-demo
	@.venv/bin/python examples/quickstart.py

test: check
	$(RUN) pytest $(PARALLEL)

# The same, and which lines it reached: before Python 3.14, measuring that takes as long as the tests.
coverage: check
	$(RUN) pytest $(PARALLEL) --cov

# `fix` corrects what `check` reports about format, lint and generated code.
check: .venv/installed-dev
	$(RUN) ruff format --check
	$(RUN) ruff check
	.venv/bin/python tools/gen_sync.py --check
	.venv/bin/python tools/check_layers.py
	@$(MAKE) --no-print-directory -j 2 mypy pyright public-types # two at once, each on a core

mypy: .venv/installed-dev
	$(RUN) mypy

pyright: .venv/installed-dev
	$(RUN) pyright --pythonpath .venv/bin/python

public-types: .venv/installed-dev
	PYTHONPATH='$(CURDIR)' tools/public_types.sh .venv/bin/python loops_async loops_sync loops_tinker loops_local

# Compares with the limit and, once `make test` has installed it, the published client.
bench: .venv/installed-dev
	$(RUN) benchmarks

# What must hold under faults; a new seed each time, which is printed. For options: make chaos ARGS='--schedules 20'.
chaos: .venv/installed-dev
	$(RUN) tests.chaos $(ARGS)

fuzz: .venv/installed-dev
	$(RUN) tests.chaos.fuzz $(ARGS)
	$(RUN) tests.chaos.guided $(ARGS)
	$(RUN) tests.chaos.schema

soak: .venv/installed-dev
	$(RUN) tests.chaos.soak $(ARGS)

fix: .venv/installed-dev sync
	$(RUN) ruff check --fix
	$(RUN) ruff format

# Builds the documentation site; every warning is an error.
docs: .venv/installed-dev
	.venv/bin/python tools/build_docs.py docs/_build/html

# Builds it and tests the result, also in Chromium, which `apt-get install chromium` provides.
site: docs
	LOOPS_SITE=docs/_build/html $(RUN) pytest -q tests/site

# Writes loops_sync from loops_async.
sync: .venv/installed-dev
	.venv/bin/python tools/gen_sync.py

# Writes locks/ again, with the newest versions that pyproject.toml allows.
lock:
	tools/lock.sh

# Builds the wheel and the sdist into dist/, checks them, and uses each in a clean environment.
dist: .venv/installed-dev
	tools/dist.sh

# make release VERSION=1.2.3: the package's version and the changelog's heading, in one commit with its tag.
release: .venv/installed-dev
	.venv/bin/python tools/release.py $(VERSION)

.venv/installed-demo: pyproject.toml tools/make_venv.sh locks/demo.txt locks/torch.txt
	@PYTHON='$(PYTHON)' tools/make_venv.sh .venv demo
	@touch $@

# What is in it includes what the demo needs.
.venv/installed-dev: pyproject.toml tools/make_venv.sh locks/dev.txt locks/torch.txt
	@PYTHON='$(PYTHON)' tools/make_venv.sh .venv dev
	@touch .venv/installed-demo $@
