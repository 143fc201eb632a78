# make demo   the main job on the embedded corpus: two models, their likelihood, samples, a classifier, a report
# make test   the test suite; DATA_DIR=/path/to/data adds the tests on real text
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python main.py mode=classify

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --durations=40

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) outputs .cache
