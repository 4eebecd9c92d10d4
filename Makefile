# make test    the test suite, in an environment made from nothing (Python 3.11 or 3.12, make, a C compiler)
# make demo    a first look: pictures are drawn, trained on, evaluated and recorded; rm -r demo to do it again
# make demo-chain    pretraining on one set of drawn pictures, fine-tuning on another, as one job
# make demo-sweep    a search over bins and distillation on drawn pictures, with its verdict and report
# Also: make check (format, lint, types), make test-slow (the longer proofs), make lock (new versions).

PYTHON ?= python3
BIN := .venv/bin
UV_VERSION := 0.13.9
READY := .venv/installed

.PHONY: test test-slow demo demo-chain demo-sweep check format lock clean

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadgroup

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

demo: $(READY)
	$(BIN)/python -m jobs.prepare synthetic --images 12 --image-side 128 --max-shapes 4 --split drawn --out demo/shards
	$(BIN)/python -m jobs.train configs/demo.yaml --cluster configs/clusters/laptop.yaml
	@echo "pictures: demo/runs/demo/evaluation/final"
	@echo "the record in a browser: $(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/demo/runs/mlflow.db"

demo-chain: $(READY)
	$(BIN)/python -m jobs.pretrain_finetune configs/chains/demo.yaml

demo-sweep: $(READY)
	$(BIN)/python -m jobs.prepare synthetic --images 12 --image-side 128 --max-shapes 4 --split drawn --out demo/shards
	$(BIN)/python -m jobs.tune configs/sweeps/demo.yaml
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
