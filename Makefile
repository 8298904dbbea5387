# Everything that a user or contributor runs. Each target works on a machine that has only Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/cartpole.yaml
# One process of tests per core, and never more than four: each takes about 1 GB.
XDIST ?= -n logical --maxprocesses 4 --dist worksteal
ARGS ?=

.PHONY: install train test test-faults test-long lint format docs docs-serve dist benchmark benchmark-quick learning learning-quick clean

install: $(VENV)/.installed            ## .venv with the package and what drawing needs
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plot]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

train: install                         ## train CONFIG (CartPole-v1), then say where everything is
	$(BIN)/python -m ppo_lightning fit --config $(CONFIG) --seed_everything 1 $(ARGS)

# Two threads on two busy cores are twenty times slower than one.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test          ## every test that takes seconds, and the notebooks
	$(BIN)/python -m pytest $(XDIST) --nbmake notebooks tests $(ARGS)

test-faults: export OMP_NUM_THREADS = 1
test-faults: $(VENV)/.installed-test   ## faults again and again: kills, damaged files, signals, memory: ten minutes or more
	$(BIN)/python -m pytest $(XDIST) -m long tests/faults $(ARGS)

test-long: $(VENV)/.installed-test     ## the same, the whole grid of policies, and learning curves: hours
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(VENV)/.installed-test          ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-test        ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-docs          ## the documentation as a site, in site/; a broken link is an error
	$(BIN)/mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.installed-docs    ## the same on http://127.0.0.1:8000, built again after each change
	$(BIN)/mkdocs serve $(ARGS)

dist: $(VENV)/.installed-test          ## a wheel and an sdist, in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

benchmark: $(VENV)/.installed-test     ## speed beside seven other libraries, each in an environment of its own: an hour
	$(BIN)/python benchmarks/run.py $(ARGS)

benchmark-quick: export OMP_NUM_THREADS = 1
benchmark-quick: $(VENV)/.installed-test ## speed over a plain torch loop: fails where a change made it slower, some minutes
	$(BIN)/python benchmarks/quick.py $(ARGS)

learning: export OMP_NUM_THREADS = 1
learning: $(VENV)/.installed-test      ## returns over ten seeds beside published ones: trains what has no row in benchmarks/results yet
	$(BIN)/python -m benchmarks.learning $(ARGS)

learning-quick: $(VENV)/.installed-test ## the same of three tasks; ARGS="--results mine" trains them again: under ten minutes
	$(BIN)/python -m benchmarks.learning --quick $(ARGS)

clean:
	rm -rf $(VENV) lightning_logs dist site
