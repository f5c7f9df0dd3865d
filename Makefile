# Each target makes .venv and installs what it needs when it is not there
PY := .venv/bin/python
DATA ?=
PAGES ?=

.PHONY: demo test test-xla docs test-docs readme pages bench dist clean

.venv/ok: settings.ini setup.py pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

demo: .venv/ok ## train with and without ProgressiveResize; DATA=folder with a folder per class
	$(PY) benchmarks/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/ok ## export in sync, pages clean, pages, tests, wheel
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/run.sh

.venv-xla/ok: settings.ini setup.py pyproject.toml
	test -x .venv-xla/bin/python || python3 -m venv .venv-xla
	.venv-xla/bin/python -m pip install -q --no-cache-dir -e '.[dev,tpu]' 'torch==2.9.*' 'torchvision==0.24.*' 'torch_xla==2.9.0'
	touch $@

test-xla: .venv-xla/ok ## the TPU's tests and page, on eight virtual cores, in an environment of their own
	PATH="$(CURDIR)/.venv-xla/bin:$$PATH" bash tests/run_xla.sh

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

bench: .venv/ok ## the measurements: seconds until plain's score, decoding and loading, precision, subsets, depthwise, attention maps, from scratch (an hour), and with DATA=folder of a folder per class fine-tuning, warm-up, the climb and which tips pay (longer)
	$(PY) benchmarks/scratch.py
	$(if $(DATA),$(PY) benchmarks/time_to_accuracy.py --data "$(DATA)")
	$(if $(DATA),$(PY) benchmarks/minutes.py --data "$(DATA)")
	$(PY) benchmarks/decode.py
	$(PY) benchmarks/loader.py
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
	rm -rf .venv .venv-xla _proc _docs build dist demo *.egg-info
