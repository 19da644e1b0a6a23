# Every target bootstraps .venv by itself.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: venv train reproduce-pong-soup test lint format learn bench fuzz chaos clean

venv: $(READY)

$(READY): constraints.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,labyrinth]"
	touch $@

train: $(READY)  ## the main job: a progressive network learns Pong Soup
	$(BIN)/rllib train -f tuned_examples/pong_soup.yaml

reproduce-pong-soup: $(READY)  ## Table 1's Pong Soup rows; stop it at any time, the same again goes on
	$(BIN)/rllib train -f tuned_examples/pong_soup_table.yaml
	$(BIN)/rllib report runs/pong-soup-table -o runs/pong-soup-table/report.html

test: $(READY)  ## on all cores; a file of tests runs in one process
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

learn: $(READY)  ## learning tests: minutes each
	$(BIN)/python -m pytest -m slow

bench: $(READY)  ## side-by-side benchmarks, on a quiet machine; writes docs/performance.md
	$(BIN)/python benchmarks/bench.py

fuzz: $(READY)  ## 10,000 damaged inputs for every loader: minutes
	$(BIN)/python -m pytest -m slow tests/test_fuzz.py

chaos: $(READY)  ## 50 kills of a training run's parts: tens of minutes
	$(BIN)/python benchmarks/chaos.py --kills 50 --seed 0 --out docs/results/chaos.json --table docs/reliability.md

clean:
	rm -rf $(VENV) build dist *.egg-info
