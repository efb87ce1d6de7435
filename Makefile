# Everything runs in an environment of its own, .venv, which the first command makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What npm writes last.
WEB := hub_cards/web/node_modules/.package-lock.json

.PHONY: demo test test-gpu test-transformers test-versions lint benchmarks clean

# Train a small recurrently stacked model on the shipped sentence pairs and translate with it.
demo: $(VENV)/made
	rm -rf runs/demo
	$(BIN)/python training/train.py training/recipes/demo.yaml

test: $(VENV)/installed
	tests/system_packages.sh
	$(MAKE) --no-print-directory $(WEB)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What a GPU alone can show; the machine's Python has a PyTorch for it, .venv may not.
test-gpu:
	$(PYTHON) -m pytest -m gpu -rP tests/test_gpu.py

# transformers' own common model tests, from its source distribution.
test-transformers: $(VENV)/installed
	PYTHON=$(CURDIR)/$(BIN)/python tests/transformers_common/run.sh

# The oldest and the newest of each library that pyproject.toml admits, each in an environment of its own.
test-versions: $(VENV)/installed
	$(BIN)/python tests/versions.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmarks: $(VENV)/installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/decoder_depth.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/decode.py

$(VENV)/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/installed: $(VENV)/made
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# transformers.js, as the web page and Node have it.
$(WEB): hub_cards/web/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --prefix hub_cards/web
	touch $@

clean:
	rm -rf $(VENV) .versions runs/demo hub_cards/web/node_modules
