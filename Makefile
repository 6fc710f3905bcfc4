# Two commands are enough for a new clone: `make demo` and `make test`. Each first makes .venv and
# installs what it needs there; the second time that takes no time.

# One thread for each of XLA's operations: pytest's workers already keep the cores busy, and small
# arrays gain nothing from a second thread.
workers ?= 2
pytest = JAX_PLATFORMS=cpu \
    XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
    $(1)/bin/python -m pytest -n $(workers) tests

.PHONY: help demo test test-oldest lint format clean

help:  ## say what there is (the default)
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | \
	    awk -F: '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo:  ## set up, then run the three stages of RLHF on a small embedded task
	@tools/setup train
	.venv/bin/python scripts/run_rlhf.py --config configs/demo/rlhf.yaml

test:  ## set up, then run all tests
	@tools/setup train,dev
	$(call pytest,.venv)

test-oldest:  ## the same with Python 3.11 and the oldest versions that are supported
	@tools/setup --oldest train,dev
	$(call pytest,.venv-oldest)

lint:  ## set up, then check style and types
	@tools/setup train,dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format:  ## set up, then put the code in the project's style
	@tools/setup train,dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## remove the environments, caches and builds; runs/ stays
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rlhf_jax scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
