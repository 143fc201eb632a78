# make demo   the main job on the embedded corpus: two models, their likelihood, samples, a classifier, a report
# make check  the rules of style and of the rooms for one file, and its own test: make check FILE=samplers/mine.py
# make docs   the documentation as a site in site/, in an environment of its own; open site/index.html
# make test   the test suite; DATA_DIR=/path/to/data adds the tests on real text
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS_VENV := .cache/docs-venv
# The extra `docs` of pyproject.toml, without the package itself and its torch.
DOCS_PINS := $(shell sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ',')

OWN_TEST = $(wildcard $(dir tests/$(FILE))test_$(notdir $(FILE)))

.PHONY: demo test docs lint check clean

demo: $(VENV)/installed
	$(BIN)/python main.py mode=classify

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=40

docs: $(DOCS_VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

$(DOCS_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS_PINS)
	touch $@

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

check: $(VENV)/installed
	$(BIN)/python -m ruff check $(FILE)
	$(BIN)/python -m ruff format --check $(FILE)
	$(BIN)/python -m pytest -q tests/test_architecture.py -k "$(FILE)"
	$(if $(OWN_TEST),$(BIN)/python -m pytest -q $(OWN_TEST))

clean:
	rm -rf $(VENV) outputs .cache site
