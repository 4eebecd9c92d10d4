# make              create .venv from the locked versions (Python 3.11 or 3.12, make, a C compiler)
# make test         run the test suite
# make test-cluster three machines on this one, as namespaces (root on Linux; skipped elsewhere)
# make demo         a first look: generate images, train, evaluate, track; rm -r demo to do it again
#                   make demo recipe=deim trains by the other recipe
# make demo-chain   pretrain on one set of generated images and fine-tune on another, as one job
# make demo-sweep   search bins and distillation on generated images, with verdict and report
# Also: make check (format, lint, types), make test-slow (the longer proofs), make format, make lock (new versions), make clean.

PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
READY := .venv/installed
NAMESPACES := --net --mount --pid --ipc --fork --kill-child --mount-proc

.PHONY: install test test-slow test-cluster demo demo-chain demo-sweep check format lock clean

install: $(READY)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadgroup

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-cluster: $(READY)
	@if test "$$(id -u)" != 0 || ! unshare $(NAMESPACES) true; then \
		echo "skipped: three machines on this one take root, and a kernel that gives it namespaces"; \
	else \
		unshare $(NAMESPACES) env DFINE_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster; \
	fi

demo: $(READY)
	$(BIN)/dfine prepare synthetic --images 12 --image-side 128 --max-shapes 4 --split drawn --out demo/shards
	$(BIN)/dfine train configs/demo.yaml $(if $(recipe),--set recipe=$(recipe) --name demo-$(recipe))
	@echo "open the run in MLflow: $(BIN)/dfine ui demo/runs/demo$(if $(recipe),-$(recipe))"

demo-chain: $(READY)
	$(BIN)/dfine pretrain-finetune configs/chains/demo.yaml

demo-sweep: $(READY)
	$(BIN)/dfine prepare synthetic --images 12 --image-side 128 --max-shapes 4 --split drawn --out demo/shards
	$(BIN)/dfine tune configs/sweeps/demo.yaml
	@echo "the report: demo/runs/demo-sweep/report.html"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Made once, and again whenever the lock changes; the stamp is written last, so a broken install never counts.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, this is {sys.version}; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-emit-index-url \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock

clean:
	rm -rf .venv build *.egg-info
