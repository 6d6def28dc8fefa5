# Two commands: `make train` and `make test`. Each first makes a virtual environment of the project's own, once.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: train test bench clean

train: .venv/ready
	$(RUN) train.py
	$(RUN) -m tools.sample out/bert_toy-raptr-0 --held_out 3 --layers 3 --top 3 --seed 0

test: .venv/ready
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2 --dist worksteal

bench: .venv/ready
	$(RUN) -m tools.bench

# On Linux the usual torch brings CUDA along. Without a GPU, PyTorch's CPU build is enough, if it can be had.
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check
CPU_ONLY = --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	@if [ `uname` = Linux ] && command -v nvidia-smi > /dev/null; \
	then echo "Installing into .venv: torch with CUDA, 3 GB, and 100 MB of other packages"; \
	else echo "Installing into .venv: torch without CUDA, 200 MB, and 100 MB of other packages"; \
		[ `uname` != Linux ] || $(PIP) $(CPU_ONLY) `grep ^torch== requirements.txt` \
		|| echo "The CPU build cannot be had; the usual torch brings CUDA, 3 GB"; \
	fi
	$(PIP) -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
