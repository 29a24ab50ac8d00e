# Each target makes what it needs in its own virtual environment; nothing outside the repository changes.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check lint clean

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/infuse train --data sample --base minilm --method ia3 --out runs/demo --overwrite
	$(BIN)/infuse predict runs/demo --top-k 2 \
	  "I left my wallet on the train and my card was in it" \
	  "why is the money I sent on Monday still not there?" \
	  "can you take me to five thousand a month on the card"

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
