# Two commands are enough for a new clone: `make demo` and `make test`. Each first makes .venv and
# installs what it needs there; the second time that takes no time.

# pytest's workers keep the cores busy; a second thread for each of XLA's operations would only have
# them wait for one another. Each file goes to one worker, which makes what its tests share once, in
# the order of tests/conftest.py: long files first. A worker that crashes is not replaced, since
# pytest-xdist can wait forever for the new one.
workers ?= 2
pytest = JAX_PLATFORMS=cpu XLA_FLAGS="--xla_cpu_multi_thread_eigen=false $(2)" \
    $(1)/bin/python -m pytest -q -n $(workers) --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0

.PHONY: help demo test test-oldest lint docs format clean

help:  ## say what there is (the default)
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | \
	    awk -F: '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo:  ## set up, then run the three stages of RLHF on a small embedded task
	@tools/setup train
	.venv/bin/python scripts/run_rlhf.py --config configs/demo/rlhf.yaml

test:  ## set up, then run all tests
	@tools/setup train,dev
	$(call pytest,.venv)

# Most of the time of the tests goes into compiling programs that run once. On the newest end the
# files that tests/conftest.py lists are compiled as users do; this one leaves most of XLA's
# optimizations out everywhere, and XLA's newer way to make a kernel of a fusion, which in this
# version takes twice as long as the older one. Tests marked `newest` run on the newest end alone.
test-oldest:  ## the same but for those marked newest, with Python 3.11 and the oldest supported versions
	@tools/setup --oldest train,test
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(call pytest,.venv-oldest,--xla_cpu_use_fusion_emitters=false) \
	    -m "not newest"

lint:  ## set up, then check style and types
	@tools/setup train,dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

docs:  ## set up, then build the documentation; a warning is an error
	@tools/setup train,docs
	rm -rf docs/_build
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "Open $(CURDIR)/docs/_build/index.html in a browser."

format:  ## set up, then put the code in the project's style
	@tools/setup train,dev
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove the environments, caches and builds; runs/ stays
	rm -rf .venv .venv-oldest .venv-bench build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlhf_jax scripts tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
