# `make demo` runs the main job on this machine, `make test` runs every check and test. Both set up .venv by
# themselves and need nothing but a POSIX shell, make and Python 3.11 or newer (PYTHON=... says which one).

RUN = .venv/bin/python -m

.PHONY: demo test check sync fix bench

demo: .venv/installed-demo
	@.venv/bin/python examples/quickstart.py

test: check
	$(RUN) pytest --cov

# What `fix` can mend, `check` finds: every line here has its mirror image there.
check: .venv/installed-dev
	$(RUN) ruff format --check
	$(RUN) ruff check
	.venv/bin/python tools/gen_sync.py --check
	.venv/bin/python tools/check_layers.py
	$(RUN) mypy
	$(RUN) pyright --pythonpath .venv/bin/python

# Side by side with the limit and, once `make test` has installed it, the published client.
bench: .venv/installed-dev
	$(RUN) benchmarks

fix: .venv/installed-dev sync
	$(RUN) ruff check --fix
	$(RUN) ruff format

# Writes loops_sync from loops_async.
sync: .venv/installed-dev
	.venv/bin/python tools/gen_sync.py

.venv/installed-demo: pyproject.toml tools/make_venv.sh
	@PYTHON='$(PYTHON)' tools/make_venv.sh demo
	@touch $@

.venv/installed-dev: .venv/installed-demo
	@PYTHON='$(PYTHON)' tools/make_venv.sh dev
	@touch $@
