# make quickstart   install, cache features, train, evaluate, report: runs/quickstart/
# make test         install, lint, type-check, run every test
# make lint         only ruff and mypy
# make clean        remove .venv, caches and what the quickstart wrote

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
FEATURES := data/quickstart_features
CONFIG := --config configs/quickstart.py

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: .venv/runtime.stamp
	$(BIN)/python launch/cache_features.py $(CONFIG) --output $(FEATURES)
	$(BIN)/python launch/train.py $(CONFIG) --workdir $(RUN) --config.data.feature_cache=$(FEATURES)
	$(BIN)/python launch/evaluate.py --workdir $(RUN) --split test --sentences true --output $(RUN)/test_true.json
	$(BIN)/python launch/evaluate.py --workdir $(RUN) --split test --sentences swapped --output $(RUN)/test_swapped.json
	$(BIN)/python launch/evaluate.py --workdir $(RUN) --split test --sentences blank --output $(RUN)/test_blank.json
	$(BIN)/python launch/report.py --workdir $(RUN)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/test.stamp
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy --no-error-summary

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info $(RUN) $(FEATURES) data/mini_refava
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than the requirements it installed, so nothing is installed twice.
.venv/runtime.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.stamp: tests/requirements.txt .venv/runtime.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@
