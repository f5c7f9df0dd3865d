# Each target makes .venv and installs what it needs when it is not there
PY := .venv/bin/python
DATA ?=
PAGES ?=

# A Python of this version where there is one (of pyenv's too), else python3
python = $(or $(shell PYENV_VERSION=$(1) python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null),python3)

.PHONY: demo test test-floor test-kaggle test-xla kaggle gpu-wheels gpu docs test-docs readme pages bench dist clean

.venv/ok: settings.ini setup.py pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

demo: .venv/ok ## train with and without ProgressiveResize; DATA=folder with a folder per class
	$(PY) benchmarks/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/ok ## export in sync, pages clean, pages, tests, wheel
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/run.sh

FLOOR_PYTHON ?= $(call python,3.10)
.venv-floor/ok: settings.ini setup.py pyproject.toml tools/versions.py
	test -x .venv-floor/bin/python || $(FLOOR_PYTHON) -m venv .venv-floor
	.venv-floor/bin/python tools/versions.py floor > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install -q --no-compile -c .venv-floor/constraints.txt -e '.[albumentations,distributed,demo]' pytest pytest-xdist hypothesis
	touch $@

test-floor: .venv-floor/ok ## a core of the tests with the lowest versions that settings.ini names, in an environment of their own
	PATH="$(CURDIR)/.venv-floor/bin:$$PATH" bash tests/run_floor.sh

.venv-kaggle/ok: settings.ini tools/versions.py
	test -x .venv-kaggle/bin/python || $(call python,$(shell sed -n 's/kaggle_python = //p' settings.ini)) -m venv .venv-kaggle
	.venv-kaggle/bin/python tools/versions.py kaggle > .venv-kaggle/image.txt
	.venv-kaggle/bin/python -m pip install -q --no-compile -r .venv-kaggle/image.txt
	touch $@

kaggle: .venv/ok ## dist/kaggle: the wheels to upload to Kaggle as a data set, for notebooks without internet
	rm -rf build
	$(PY) tools/kaggle.py dist/kaggle

test-kaggle: kaggle .venv-kaggle/ok ## the tutorial "On Kaggle" in an environment of its image's versions, without a network
	$(PY) tools/try_kaggle.py dist/kaggle .venv-kaggle/bin/python

# torch_xla's version, 2.8.0 (Kaggle's) or 2.9.0; PyTorch's and torchvision's go with it
XLA ?= 2.9.0
xla_env := .venv-xla$(if $(filter-out 2.9.0,$(XLA)),-$(XLA))
$(xla_env)/ok: settings.ini setup.py pyproject.toml
	test -x $(xla_env)/bin/python || python3 -m venv $(xla_env)
	$(xla_env)/bin/python -m pip install -q --no-cache-dir -e '.[dev,tpu]' 'torch==$(basename $(XLA)).*' 'torchvision==0.$(shell expr $(word 2,$(subst ., ,$(XLA))) + 15).*' 'torch_xla==$(XLA)'
	touch $@

test-xla: $(xla_env)/ok ## the TPU's tests and page, on eight virtual cores, in an environment of their own; XLA=2.8.0: with that torch_xla
	PATH="$(CURDIR)/$(xla_env)/bin:$$PATH" bash tests/run_xla.sh

.venv/docs: .venv/ok
	$(PY) -m pip install -q -e '.[docs]'
	touch $@

docs: .venv/docs ## the documentation in _docs/index.html, without a network
	PYTHONWARNINGS=ignore $(PY) tools/docs.py

test-docs: docs ## builds the documentation and opens every page of it in Chromium
	$(PY) -m pytest -q tests/test_docs.py

readme: .venv/ok ## README.md from nbs/index.ipynb
	$(PY) tools/readme.py

pages: .venv/ok ## run all pages and save their outputs; PAGES='nbs/train/ema.ipynb ...' those
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tools/run_pages.sh $(PAGES)

dist: .venv/ok ## sdist and wheel in dist/, and the wheel tried in a new environment, from outside the clone (torch is installed anew: minutes and gigabytes)
	rm -rf dist build
	$(PY) -m build
	bash tools/try_dist.sh

GPU_PY ?= python3
WEIGHTS ?=
gpu: ## the measurements on one CUDA GPU, eight minutes, without a network, by a Python that has torch (GPU_PY=python3) and the wheels of gpu-wheels; DATA= and WEIGHTS=folder
	$(GPU_PY) benchmarks/gpu.py $(if $(DATA),--data "$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

gpu-wheels: .venv/ok ## wheels/: what a machine with Python 3.12, torch and the usual packages needs beyond those for `make gpu`, to be installed without a network
	rm -rf wheels
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tools/gpu_wheels.sh wheels

bench: .venv/ok ## the measurements: seconds until plain's score, decoding and loading, precision, subsets, depthwise, attention maps, from scratch (an hour), and with DATA=folder of a folder per class fine-tuning, warm-up, the climb and which tips pay (longer)
	$(PY) benchmarks/scratch.py
	$(if $(DATA),$(PY) benchmarks/time_to_accuracy.py --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/minutes.py --data "$(DATA)")
	$(PY) benchmarks/decode.py
	$(PY) benchmarks/draft_training.py
	$(PY) benchmarks/loader.py $(if $(DATA),--data "$(DATA)") $(if $(RESNET18),--weights "$(RESNET18)")
	$(PY) benchmarks/progressive_resize.py --regime batches
	$(PY) benchmarks/progressive_resize.py --regime scratch
	$(PY) benchmarks/precision.py speed
	$(PY) benchmarks/cam.py bias
	$(PY) benchmarks/cam.py speed
	for part in convert recover speed; do $(PY) benchmarks/depthwise.py $$part; done
	$(PY) benchmarks/ema.py $(if $(DATA),--data "$(DATA)")
	$(PY) benchmarks/subset.py
	$(PY) benchmarks/runs.py
	for part in '' --decode; do $(PY) benchmarks/distributed.py $$part; done
	$(if $(DATA),$(PY) benchmarks/progressive_resize.py --regime fine_tune --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/precision.py accuracy --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/warmup.py --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/augment.py speed --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/augment.py accuracy --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/climb.py carry --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/climb.py signal --data "$(DATA)")
	$(PY) benchmarks/verdicts.py
	$(if $(DATA),$(PY) benchmarks/tips_report.py --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/rank_archs.py --data "$(DATA)")
	$(if $(and $(DATA),$(RESNET18)),$(PY) benchmarks/targets.py --data "$(DATA)" --resnet18 "$(RESNET18)")

clean:
	rm -rf .venv .venv-floor .venv-kaggle .venv-xla* _proc _docs build dist demo *.egg-info
