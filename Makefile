# make demo   the main job on the embedded corpus: two models, their likelihood, samples, a classifier, a report
# make check  the rules of style and of the rooms for one file, and its own test: make check FILE=samplers/mine.py
# make test   the test suite; DATA_DIR=/path/to/data adds the tests on real text
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint check clean

demo: $(VENV)/installed
	$(BIN)/python main.py mode=classify

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --durations=40

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

check: $(VENV)/installed
	$(BIN)/python -m ruff check $(FILE)
	$(BIN)/python -m ruff format --check $(FILE)
	$(BIN)/python -m pytest tests/test_architecture.py -k "$(FILE)" $(wildcard $(dir tests/$(FILE))test_$(notdir $(FILE)))

clean:
	rm -rf $(VENV) outputs .cache
