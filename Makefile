# Every target does its own set-up: a machine with Python 3.11 or newer and make needs nothing else (on Windows Git Bash).
PYTHON ?= $(if $(filter Windows_NT,$(OS)),python,python3)
PROGRAMS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(PROGRAMS)
UV := uv==0.13.9
PACKAGING := build==1.6.1 twine==7.0.0
REPORTS := $(or $(IRRA_REPORTS),reports)
BENCH := $(REPORTS)$(if $(filter-out 0,$(IRRA_SMOKE)),/smoke)/benchmark
ARGS ?=
DATASET ?=

.PHONY: train pretrain test test-long lab lock lint notebooks report studies explorer bench bench-explorer browser release docs

train: .venv/ready  ## trains on the default data set; ARGS="-p dataset rstp -p epochs 1" goes to irra train
	@$(BIN)/irra train $(ARGS)

pretrain: .venv/ready  ## makes the small CLIP's shipped weights again: renders, trains for about an hour, resumes after a kill
	$(BIN)/python -m irra_core.synthetic.pretraining

test: .venv/milvus lint  ## everything that continuous integration checks
	@if [ "$$CI" = true ]; then $(MAKE) browser; fi
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
	$(MAKE) notebooks

test-long: .venv/ready  ## kills more than 50 training processes, watches memory and files over 10,000 steps, and stops a run of two machines
	$(BIN)/python -m pytest -m long

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-count --verify notebooks/*.ipynb

notebooks: .venv/milvus  ## every notebook, shrunken, cell by cell; then one as a user types it
	rm -rf reports/smoke
	$(BIN)/python -m pytest -m notebook
	IRRA_SMOKE=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks
	cd notebooks && IRRA_SMOKE=1 ../$(BIN)/papermill --no-progress-bar train.ipynb ../reports/smoke/out.ipynb -p seed 1

studies: .venv/ready  ## the paper's five questions, then the page of results; ARGS="-p size small -p workers 2" goes to irra study, DATASET=rstp takes real data
	@for study in rq1 rq2 rq3 rq4 released; do \
		$(BIN)/irra study $$study $(if $(DATASET),-p dataset $(DATASET)) $(ARGS) || exit; \
	done
	@$(BIN)/irra study rq5 $(ARGS)
	@for study in attention similarity; do $(BIN)/irra study $$study $(if $(DATASET),-p dataset $(DATASET)) || exit; done
	@$(BIN)/python -m irra_core.studies.verdicts $(if $(findstring size small,$(ARGS)),small)
	@$(MAKE) report

report: .venv/ready  ## every finished run and study on one page, index.html in the reports folder
	@$(BIN)/irra report

lab: .venv/ready  ## JupyterLab, on this machine only, to who has the token; ARGS="--ip=0.0.0.0" for a container's published port
	@if [ "$$(id -u)" = 0 ]; then root=--allow-root; \
		echo "You are root, as in a container: whoever has the token of the address below is root here too."; fi; \
	exec $(BIN)/jupyter lab --notebook-dir=. $$root $(ARGS)

explorer: .venv/ready  ## serves the explorer without its code, on this machine only, to who has the token; it loads nothing from elsewhere
	@$(BIN)/irra explore $(ARGS)

bench: .venv/ready  ## times training, evaluation and loading; ARGS="-p official /path/to/IRRA" runs the released code beside it
	@mkdir -p "$(BENCH)"
	$(BIN)/papermill notebooks/benchmark.ipynb "$(BENCH)/benchmark.ipynb" $(ARGS)
	@cat "$(BENCH)/benchmark.md"

bench-explorer: .venv/ready  ## milliseconds from a key press to the grid over 100,000 photos, measured in Chromium
	@$(BIN)/python benchmarks/explorer.py

browser: .venv/ready  ## Chromium, in which make test uses the explorer; without it that test is skipped
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -q -y chromium; \
	else echo "install Chromium: sudo apt-get install -y chromium (or your system's way)"; fi

release:  ## sdist and wheel in dist/, checked; TAG=v0.1.0 must be the version's; needs no other environment, publishes nothing
	rm -rf dist build irra_core.egg-info
	$(PYTHON) -m venv build/packaging
	build/packaging/$(PROGRAMS)/python -m pip install --quiet --disable-pip-version-check $(PACKAGING)
	build/packaging/$(PROGRAMS)/python -m build --outdir dist .
	build/packaging/$(PROGRAMS)/python -m twine check --strict dist/*
	build/packaging/$(PROGRAMS)/python tests/release.py dist $(TAG)

docs: .venv-docs/ready  ## the website, in docs/_build/html, with its links checked; needs neither .venv nor torch
	rm -rf docs/_build
	.venv-docs/$(PROGRAMS)/python docs/site/sources.py docs/_build/source
	.venv-docs/$(PROGRAMS)/python -m sphinx -q -W --keep-going -c docs/site docs/_build/source docs/_build/html
	@.venv-docs/$(PROGRAMS)/python docs/site/check.py docs/_build/html

LOCK := pip compile --quiet --universal --upgrade --no-emit-index-url --no-header --generate-hashes
lock: .venv/ready  ## refreshes requirements.lock, and the locks of the Milvus server and of the website, from pyproject.toml
	$(BIN)/python -m pip install --quiet $(UV)
	$(BIN)/python -m uv $(LOCK) --extra test pyproject.toml -o requirements.lock
	@for extra in milvus-server docs; do \
		$(BIN)/python -c "import sys, tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]], sep='\n')" $$extra \
			| $(BIN)/python -m uv $(LOCK) --no-annotate - -o requirements-$${extra%-server}.lock || exit; \
	done

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV) \
		&& $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch .venv/ready

.venv/milvus: .venv/ready requirements-milvus.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-milvus.lock
	@touch .venv/milvus

.venv-docs/ready: requirements-docs.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/$(PROGRAMS)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	@touch .venv-docs/ready
