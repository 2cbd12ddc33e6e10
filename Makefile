# demo, test and check set themselves up: a virtual environment beside this file that reuses what PYTHON already has.
PYTHON ?= python3
# A plain `torch` brings gigabytes of CUDA; `make TORCH=torch` for those who want it. Used only where torch is missing.
TORCH ?= torch==2.13.0
MODEL ?= weights/mini
VENV ?= .venv
RUN := $(VENV)/bin/python
# Threads that wait asleep: spinning ones bring small models to a halt on a machine that is busy otherwise.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check clean parity-full load-peak full-size-edit diffusers-edit bench-mini lines

demo: $(VENV)/run.stamp
	$(RUN) -m weights.demo --model $(MODEL)

check: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -m "not slow"

test: check
	$(RUN) -m pytest -m slow

parity-full: $(VENV)/test.stamp  ## the networks at full size against diffusers and transformers
	$(RUN) tests/bench/parity_full.py

load-peak: $(VENV)/test.stamp  ## peak memory of loading a full-size checkpoint
	$(RUN) tests/bench/load_peak.py

full-size-edit: $(VENV)/test.stamp  ## a 512 x 512 edit with full-size random weights
	$(RUN) tests/bench/full_size_edit.py

diffusers-edit: $(VENV)/test.stamp  ## the whole edit against diffusers' pipeline, blend corrected
	$(RUN) tests/bench/diffusers_edit.py --model $(MODEL)

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --system-site-packages $(VENV) 2>/dev/null \
	|| $(PYTHON) -m venv --system-site-packages --without-pip $(VENV) \
	|| { rm -rf $(VENV); echo "$(PYTHON) has no venv module: install it (Debian: python3-venv)"; exit 1; }
	@$(RUN) -m pip --version >/dev/null || { rm -rf $(VENV); echo "$(PYTHON) has no pip: install it (Debian: python3-venv)"; exit 1; }
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp pyproject.toml
	@$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(RUN) -m pip install --quiet --editable '.[test,check]'
	@touch $@

bench-mini: $(VENV)/run.stamp  ## the miniature's edits against known truth, JSON and plots in .bench-mini; needs the Noto emoji font
	$(RUN) -m pip install --quiet --editable '.[eval]'
	test -e weights/mini/judge/judge.safetensors || $(RUN) -m weights.judge
	$(RUN) -m weights.bench --model $(MODEL)

lines:  ## the reading order with line counts
	@cd minidiffedit && wc -l diffedit.py ddim.py sd.py unet.py attention.py vae.py clip.py tokenizer.py checkpoint.py

clean:
	rm -rf $(VENV) demo .bench-mini build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
