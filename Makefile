# demo, test and check set themselves up: a virtual environment beside this file that reuses what PYTHON already has.
PYTHON ?= python3
# A plain `torch` brings gigabytes of CUDA; `make TORCH=torch` for those who want it. Used only where torch is missing.
TORCH ?= torch==2.13.0
MODEL ?= weights/mini
KINDS ?= base
VENV ?= .venv
# `make test LOCKED=tests/locked.txt` takes every package as it was last proven, for Python 3.11.
LOCKED ?=
PIP = $(RUN) -m pip install --quiet $(LOCKED:%=--constraint %)
# Processes that share the tests; one that has nothing left takes over half of what another still has to run.
WORKERS ?= 2
RUN := $(VENV)/bin/python
# Threads that wait asleep: spinning ones bring small models to a halt on a machine that is busy otherwise.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-long check test-browser page-memory clean parity-full load-peak full-size-edit diffusers-edit bench-gpu bench-mini table tour lock matrix compare evidence evidence-quick lines bench bench-peers bench-steps bench-busy figures batch-1000 test-scale fuzz faults mutants test-versions audit same-results lint bench-openvino bench-costs fuzz-parsers

demo: $(VENV)/run.stamp
	$(RUN) -m weights.demo --model $(MODEL)

check: lint
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test: lint  ## one run of pytest for fast and slow: each worker takes long to begin
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not long"

.PHONY: lint
lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test-long: $(VENV)/test.stamp  ## each inversion under each editor on a network, memory of maps at 64 x 64 cells, kernels for every GPU: some minutes
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m long

parity-full: $(VENV)/test.stamp  ## the networks at full size against diffusers and transformers
	$(RUN) tests/bench/parity_full.py

load-peak: $(VENV)/test.stamp  ## peak memory of loading a full-size checkpoint; KINDS="instruct inpainting example" of others
	$(RUN) tests/bench/load_peak.py --kinds $(KINDS)

full-size-edit: $(VENV)/test.stamp  ## a 512 x 512 edit with full-size random weights
	$(RUN) tests/bench/full_size_edit.py

diffusers-edit: $(VENV)/test.stamp  ## the whole edit against diffusers' pipeline, blend corrected
	$(RUN) tests/bench/diffusers_edit.py --model $(MODEL)

bench: $(VENV)/run.stamp  ## seconds, rates, memory and errors on this machine, random weights of full size, 256 x 256
	$(VENV)/bin/minidiffedit bench --size 256 --repeats 2

bench-peers: $(VENV)/test.stamp  ## against diffusers in one process, in turn; PEERS="--size 256 --pairs 2" for less
	$(RUN) tests/bench/against_diffusers.py $(PEERS)

bench-steps: $(VENV)/test.stamp  ## what each step towards speed bought; STEPS="--only compile" for others
	$(RUN) tests/bench/each_step.py $(STEPS)

bench-busy: $(VENV)/run.stamp  ## an edit quiet and beside one busy process, by how threads wait; BUSY="--values 1000 5000" for others
	$(RUN) tests/bench/busy.py $(BUSY)

bench-openvino: $(VENV)/test.stamp  ## the UNet and an edit against OpenVINO on this CPU; needs the package; OPENVINO="--size 256" for less
	$(RUN) -c 'import openvino' 2>/dev/null || $(RUN) -m pip install --quiet openvino
	$(RUN) tests/bench/against_openvino.py $(OPENVINO)

.PHONY: test-openvino
test-openvino: $(VENV)/test.stamp  ## `--compile openvino`: numbers, what is kept between runs
	$(RUN) -m pip install --quiet --editable '.[openvino]'
	$(RUN) -m pytest tests/test_openvino.py

.PHONY: bench-partial
bench-partial: $(VENV)/run.stamp  ## DiffEdit decoded in a rectangle against the whole, error and seconds by size of mask; PARTIAL="--full --steps 4"
	$(RUN) tests/bench/partial.py $(PARTIAL)

.PHONY: bench-gradients
bench-gradients: $(VENV)/run.stamp  ## methods with gradients on random weights of full size: a row's seconds, peak memory; GRADIENTS="--size 512"
	$(RUN) tests/bench/gradient_costs.py $(GRADIENTS)

bench-costs: $(VENV)/run.stamp  ## every method against the bare model calls that it makes; COSTS="--only masactrl" for others
	$(RUN) tests/bench/method_costs.py $(COSTS)

VERSIONS ?= .versions
test-versions:  ## the fast tests with the lowest declared versions and the newest, on the Pythons here; TRIED="--only lowest" for others
	$(PYTHON) tests/versions.py --into $(VERSIONS) --workers $(WORKERS) $(TRIED)

fuzz: $(VENV)/test.stamp  ## bad input of every kind, over 15,000 cases, counts by category; FUZZ="--seed 1 --only masks" for others
	$(RUN) tests/fuzz $(FUZZ)

MINUTES ?= 3
fuzz-parsers: $(VENV)/test.stamp  ## the readers of headers, states, manifests and prompts, guided by the lines they run
	$(RUN) tests/fuzz --parsers $(MINUTES) $(FUZZ)

faults: $(VENV)/test.stamp  ## runs cut short by signals, memory and disk; FAULTS="--seed 1" for other moments
	$(RUN) tests/faults $(FAULTS)

lock: $(VENV)/made.stamp  ## tests/locked.txt anew: all that '.[test,check]' brings today
	$(RUN) -m pip install --dry-run --ignore-installed --quiet --report - '.[test,check]' $(TORCH) | $(RUN) tests/bench/lock.py

mutants: $(VENV)/test.stamp  ## small mistakes in core and methods that the tests should notice; MUTANTS="--minutes 5 --only ddim" for fewer
	$(PIP) --editable '.[mutants]'
	$(RUN) tests/bench/mutation.py $(MUTANTS)

audit: $(VENV)/run.stamp  ## the run-time packages against the database of known problems; fails where it cannot be asked
	$(RUN) -m pip install --quiet --editable '.[audit]'
	$(RUN) tests/bench/audit.py > $(VENV)/audited.txt
	$(RUN) -m pip_audit --strict --no-deps --disable-pip --progress-spinner off -r $(VENV)/audited.txt

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --system-site-packages $(VENV) 2>/dev/null \
	|| $(PYTHON) -m venv --system-site-packages --without-pip $(VENV) \
	|| { rm -rf $(VENV); echo "$(PYTHON) has no venv module: install it (Debian: python3-venv)"; exit 1; }
	@$(RUN) -m pip --version >/dev/null || { rm -rf $(VENV); echo "$(PYTHON) has no pip: install it (Debian: python3-venv)"; exit 1; }
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp pyproject.toml
	@$(RUN) -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PIP) --editable '.[test,check]'
	@touch $@

test-browser: $(VENV)/test.stamp  ## the report and the page in headless Chromium; screenshots in .screenshots
	$(RUN) -m pip install --quiet --editable '.[browser,ui]'
	$(RUN) -m pytest tests/browser -m "not long"

page-memory: $(VENV)/test.stamp  ## the page's resident memory over 200 edits of twenty visitors
	$(RUN) -m pip install --quiet --editable '.[browser,ui]'
	$(RUN) -m pytest tests/browser -m long -s

bench-gpu: $(VENV)/test.stamp  ## what only a CUDA device can answer: right, rates, ratios, the kernels; with TORCH=torch; GPU="--quick"
	$(RUN) tests/bench/gpu.py --json bench-gpu.json $(GPU)

bench-mini: $(VENV)/run.stamp  ## the miniature's edits against known truth, JSON and plots in .bench-mini; needs the Noto emoji font
	$(RUN) -m pip install --quiet --editable '.[figures]'
	test -e weights/mini/judge/judge.safetensors || $(RUN) -m weights.judge
	$(RUN) -m weights.bench --model $(MODEL)

matrix: $(VENV)/run.stamp  ## every inversion before every editor on the miniature, table in .compare; resumes; MATRIX="--scenes 3" for less
	test -e weights/mini/judge/judge.safetensors || $(RUN) -m weights.judge
	$(RUN) -m weights.compare matrix --model $(MODEL) $(MATRIX)

compare: $(VENV)/run.stamp  ## who wins: every method on known scenes, table and plot in .compare; resumes; COMPARE=--quick, or "--pie FOLDER"
	$(RUN) -m pip install --quiet --editable '.[figures]'
	test -e weights/mini/judge/judge.safetensors || $(RUN) -m weights.judge
	$(RUN) -m weights.who_wins --model $(MODEL) $(COMPARE)

evidence: $(VENV)/run.stamp  ## the paper's claims on the miniature, with intervals and verdicts, in .evidence; resumes; EVIDENCE="..." for options
	$(RUN) -m pip install --quiet --editable '.[figures]'
	test -e weights/mini/judge/judge.safetensors || $(RUN) -m weights.judge
	$(RUN) -m weights.evidence --model $(MODEL) $(EVIDENCE)

evidence-quick: EVIDENCE = --quick
evidence-quick: evidence  ## the same on 16 scenes a claim

ASSETS ?= .github/assets
SCENES := weights/mini/scenes
figures: $(VENV)/run.stamp  ## the README's contact sheet and figures, on the miniature
	$(RUN) -m pip install --quiet --editable '.[figures]'
	$(RUN) -m minidiffedit sheet $(SCENES)/horse-zebra/source.png --source "a photo of a horse on a grass field" --target "a photo of a zebra on a grass field" --seed 0 --height 144 --model weights/mini -o $(ASSETS)/sheet.png
	$(RUN) -m minidiffedit figure threshold $(SCENES)/dog-cat/source.png --source "a photo of a dog on a sandy beach" --target "a photo of a cat on a sandy beach" --seed 0 --height 144 --model weights/mini -o $(ASSETS)/threshold.png
	$(RUN) -m minidiffedit figure mask $(SCENES)/lemon-strawberry/source.png --source "a photo of a lemon in the snow" --target "a photo of a strawberry in the snow" --seed 0 --height 144 --model weights/mini -o $(ASSETS)/mask.png

table: $(VENV)/run.stamp  ## after a change of the table: rows counted anew, minidiffedit/methods/README.md rendered
	$(RUN) tests/bench/table.py

tour: $(VENV)/test.stamp  ## run the notebook anew, its pictures with it
	$(RUN) tests/bench/tour.py

batch-1000: $(VENV)/run.stamp  ## 1,000 rows: memory per row, time against single edits, a killed run's end; ROWS="--rows 200" for less
	OMP_NUM_THREADS=1 $(RUN) tests/scale/thousand.py $(ROWS)

same-results: $(VENV)/run.stamp  ## the shell's results against those of an earlier commit, by hash; SAME="--only batch" for others
	$(RUN) tests/bench/same_results.py $(SAME)

test-scale: $(VENV)/test.stamp  ## Ray with a worker killed half-way, torchrun with two processes
	$(RUN) -m pip install --quiet --editable '.[ray]'
	$(RUN) -m pytest tests/scale/ray_job.py tests/scale/test_torchrun.py

lines:  ## the reading order with line counts
	@cd minidiffedit && wc -l diffedit.py ddim.py sd.py unet.py attention.py vae.py clip.py tokenizer.py checkpoint.py

clean:
	rm -rf $(VENV) $(VERSIONS) demo .bench-mini .compare .evidence .photographs .samples .screenshots build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
