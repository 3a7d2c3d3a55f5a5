# make run    set up .venv, execute every notebook headless, write the report, generate some text
# make test   set up .venv, lint, type-check and test
# make lab    set up .venv, open JupyterLab on the tour
# make bench  measure the kernels on a Hopper GPU, write benchmarks/baselines/<device>.jsonl.xz
# make sanitize  NVIDIA's compute-sanitizer over the kernels on a Hopper GPU: memcheck, then racecheck
# make clean  remove .venv, caches and local runs
#
# Needs python3 (3.11 or later, with its venv module), git, make and a C compiler. PYTHON=... chooses the interpreter.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
JOBS ?= 2
RUN_ARGS ?=
PROMPT ?= def __init__(self
PYTEST_ARGS ?= -q -n 2
LAB_ARGS ?=
BENCH_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

# Prints the first interpreter that is new enough and can make environments; otherwise says what was found.
define FIND_PYTHON
found=; \
for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	path=$$(command -v "$$candidate") || continue; \
	version=$$("$$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	"$$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { found="$$found $$path is $$version;"; continue; }; \
	"$$path" -c 'import ensurepip, venv' 2>/dev/null || { \
		found="$$found $$path is $$version but lacks venv or ensurepip (Debian, Ubuntu: apt install python$$version-venv);"; \
		continue; }; \
	python=$$path; break; \
done; \
if [ -z "$$python" ]; then \
	echo "dsv4lab needs Python 3.11 or later with the venv module. Found:$${found:- no Python at all;}" \
		"install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1; \
fi
endef

.PHONY: run test lint lab bench sanitize notebooks constraints clean setup

run: $(STAMP)
	@status=0; \
	$(BIN)/python -m dsv4lab.cli run --jobs $(JOBS) $(RUN_ARGS) || status=$$?; \
	[ $$status -eq 130 ] && exit 130; \
	$(BIN)/python -m dsv4lab.cli report || status=1; \
	echo; echo "The nano model continues '$(PROMPT)':"; \
	OMP_NUM_THREADS=1 $(BIN)/python -m dsv4lab.cli generate "$(PROMPT)" --max-new-tokens 60 --drafts 2 --stats || status=1; \
	exit $$status

# Two workers, one thread each: a thread pool a worker would have them wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m dsv4lab.lab.pairing --check
	$(BIN)/python -m dsv4lab.lab.operator_map --check
	$(BIN)/python -m dsv4lab.lab.layer_table --check

# JupyterLab refuses to start as root unless told to, and containers are root.
lab: $(STAMP)
	@$(BIN)/jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements # asks about news
	$(BIN)/python -m jupyterlab $$([ "$$(id -u)" = 0 ] && echo --allow-root) --ServerApp.root_dir='$(CURDIR)' \
		--LabApp.default_url=/lab/tree/notebooks/01_tour.ipynb $(LAB_ARGS)

# Rows go to a file named after the device; BENCH_ARGS="OUT.jsonl --only linear --quick" chooses.
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# Needs nvcc and compute-sanitizer of the CUDA toolkit; racecheck's outputs are kept.
sanitize: $(STAMP)
	set -e; for script in sanitize sanitize_attention sanitize_model; do \
		compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(BIN)/python -m tests.kernels.$$script; \
	done
	mkdir -p build/racecheck
	$(BIN)/python tests/kernels/racecheck.py build/racecheck

# Generate every notebooks/*.ipynb from its .py twin.
notebooks: $(STAMP)
	@$(BIN)/python -m dsv4lab.lab.pairing --write

setup: $(STAMP)

# setuptools first and no build isolation: the build, too, uses only pinned versions.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		$(FIND_PYTHON); \
		echo "Setting up $(VENV) with $$python; the first time takes a few minutes."; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

# Resolve pyproject.toml afresh in a clean environment and pin what it gives (torch's CPU label is not part of its version).
constraints:
	@$(FIND_PYTHON); \
	scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	set -e; \
	"$$python" -m venv "$$scratch/venv"; \
	cp -r pyproject.toml README.md LICENSE dsv4lab "$$scratch"; \
	"$$scratch/venv/bin/python" -m pip install --quiet --upgrade setuptools; \
	"$$scratch/venv/bin/python" -m pip install --quiet --no-build-isolation "$$scratch[test]"; \
	head -n 1 constraints.txt > "$$scratch/constraints.txt"; \
	"$$scratch/venv/bin/python" -m pip list --format=freeze | grep -viE '^(pip|dsv4lab)=' | sed 's/+cpu$$//' | LC_ALL=C sort -f \
		>> "$$scratch/constraints.txt"; \
	mv "$$scratch/constraints.txt" constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info executed/local .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
