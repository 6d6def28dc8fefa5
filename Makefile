# Two commands: `make train` and `make test`. Each first makes a virtual environment of the project's own, once.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: train test bench clean

train: .venv/ready
	$(RUN) train.py

test: .venv/ready
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2

bench: .venv/ready
	$(RUN) -m tools.bench

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
