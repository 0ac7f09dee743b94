# `make demo` and `make test` are all a newcomer needs: the first run makes .venv, later runs reuse it.
#
#   PYTHON=python3.12       the interpreter .venv is made from
#   VENV=path               another place for the environment
#   VENV=none               no environment: use PYTHON and the torch that it has; downloads nothing
#                           (what `make gpu` does unless told otherwise)
#   TORCH='torch==2.12.*'   install another torch than the pinned one (any pip requirement)
#   TORCH_PIP='...'         options of pip where it installs torch, such as another index
#   DEQFUSE_BUILD=python    do without the C++ (cpu: stop where it cannot be built; default: say so)
#   ARGS='...'              passed on to `deqfuse demo` or to pytest

PYTHON ?= python3
VENV ?= $(if $(filter gpu gpu-test gpu-bench,$(MAKECMDGOALS)),none,.venv)
CONSTRAINTS := constraints-dev.txt
PINNED := $(shell grep -o '^torch==[^ ]*' $(CONSTRAINTS))
BUILT_WITH := $(shell grep -om 1 'setuptools>=[0-9.]*' pyproject.toml)
TORCH ?= $(PINNED)
TORCH_PIP ?=
ARGS ?=

ifeq ($(VENV),none)
PY := $(PYTHON)
SETUP := use-python
else
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help demo docs quick test test-ci test-full test-integrations test-versions wheel lint bench bench-full gpu gpu-test gpu-bench has-gpu ptx sanitize clean check-python use-python module

help:
	@echo "make demo       train on real data, write deqfuse-report/    ARGS='--help' lists its options"
	@echo "make quick      lint, type check and the fast proofs (a minute)"
	@echo "make test       the same with all tests that take seconds (minutes)    ARGS='-k name' picks tests"
	@echo "make test-ci    the tests that compile for long: shipped kernels, sanitizers (minutes)"
	@echo "make test-full  all tests, the slow grids too"
	@echo "make test-integrations  the examples under Lightning, Hugging Face, skorch and ONNX; installs those"
	@echo "make test-versions  the same as make test without lint, for every supported Python and torch (hours,"
	@echo "                10 GB): PAIRS='3.12-2.11 3.13-*' picks, PYTHONS='paths' names interpreters that are"
	@echo "                not on PATH, KEEP=1 keeps environments, AGAIN=1 repeats, WHEEL=FILE tests that wheel's"
	@echo "                C++ instead of building it for each; tables in build/versions"
	@echo "make wheel      dist/: a source distribution and the wheel for this kind of machine, all supported"
	@echo "                versions of Python and torch (DEQFUSE_BUILD=python: for any machine, without the C++)"
	@echo "make lint       ruff and mypy only"
	@echo "make docs       the documentation, strictly, into build/docs (minutes; Python 3.11 or later)"
	@echo "make bench      speed, memory and convergence against others (5 minutes); writes README.md's table"
	@echo "make bench-full the same for every case, regime and sweep; takes long"
	@echo "make gpu        on an NVIDIA GPU: build, tests, compute-sanitizer, profile, benchmarks, in parts"
	@echo "                PART='tests profile' picks, LIMIT=540 ends in time, AGAIN=1 repeats, GPU_OUT=folder,"
	@echo "                STATE=state.json goes on where another run's folder is gone"
	@echo "make gpu-test   its build and tests only    make gpu-bench  its build and benchmarks only"
	@echo "make ptx        compiled GPU kernels on an emulator that looks for races (some twenty minutes)"
	@echo "make sanitize   the C++ kernels under ASan and UBSan (a minute)   SANITIZE=thread for others"
	@echo "make clean      remove what builds and tools left; .venv and reports stay"
	@echo "Options: PYTHON=..., VENV=..., TORCH=..., explained at the top of Makefile"

demo: module
	@echo "== Demo: deqfuse demo $(ARGS); trains five fusions, about 2 minutes (ARGS=--quick: seconds)"
	@$(PY) -m deqfuse_command demo $(ARGS)

# $(call tests,what,options) on all cores: with worksteal a worker that is done takes tests from
# another, for a few tests take as long as hundreds. A borrowed Python may lack pytest-xdist.
tests = echo "== Tests: $(1)"; \
	$(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses auto --maxprocesses 8 --dist worksteal) $(2) $(ARGS)

# Folders whose tests start few processes and compile nothing.
QUICK := $(addprefix tests/,api cpu cuda deq gradients layer solvers)
quick: lint module
	@$(call tests,the fast proofs,-m "not slow and not ci" $(QUICK))

test: lint module
	@$(call tests,all but those marked slow or ci,-m "not slow and not ci")

test-ci: module
	@$(call tests,those marked ci,-m "ci and not slow")

test-full: lint module
	@$(call tests,all)

test-integrations: module $(if $(filter none,$(VENV)),,$(VENV)/.integrations)
	@$(call tests,the integrations,tests/integrations)

# Warnings are errors, no network is asked, and what links to what is checked in the pages themselves.
# DEQFUSE_DOCS_LINK_TORCH=1 adds links into torch's pages, for which its inventory is downloaded.
DOCS := build/docs
docs: module $(if $(filter none,$(VENV)),,$(VENV)/.docs)
	@echo "== Documentation: $(DOCS)/index.html (log: build/docs.log)"
	@rm -rf $(DOCS); $(PY) -m sphinx -q -W --keep-going -j auto docs $(DOCS) >build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@$(PY) -m tools.check_site $(DOCS)

# $(call tool,module,command...) runs a lint tool; only a borrowed Python may lack it.
tool = if $(PY) -c 'import $(1)' 2>/dev/null; then $(PY) -m $(2); \
	else echo "   skipped: $(PY) has no $(1)"; test $(VENV) = none; fi

# tools/versions.py. A pair that has passed is not run again.
PAIRS ?=
PYTHONS ?=
test-versions: check-python
	@$(BASE) -m tools.versions $(foreach pair,$(PAIRS),'$(pair)') $(foreach path,$(PYTHONS),--python $(path)) \
	  $(if $(TORCH_PIP),--torch-pip='$(TORCH_PIP)') $(if $(ARGS),--tests="$(ARGS)") $(if $(LIMIT),--limit $(LIMIT)) \
	  $(if $(KEEP),--keep) $(if $(AGAIN),--again) $(if $(WHEEL),--wheel $(WHEEL))

# What an earlier build left in build/ would go into the wheel.
wheel: $(SETUP)
	@echo "== Source distribution and wheel (log: build/wheel.log)"
	@rm -rf build/lib* build/bdist*; mkdir -p build dist
	@{ $(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' && \
	  DEQFUSE_BUILD=$${DEQFUSE_BUILD:-cpu} $(PY) -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir dist .; } > build/wheel.log 2>&1 || { tail -n 40 build/wheel.log; exit 1; }
	@ls -1 dist

lint: $(SETUP)
	@echo "== Lint: ruff check, ruff format --check, mypy"
	@$(call tool,ruff,ruff check . && $(PY) -m ruff format --check .)
	@$(call tool,mypy,mypy)

# Compiles what changed since the last time; where nothing can be compiled it says so and goes on.
module: $(SETUP)
	@echo "== C++ module: compiling what changed (at first about a minute; log: build/module.log)"
	@mkdir -p build; $(PY) setup.py -q build_ext --inplace > build/module.log 2>&1 || { cat build/module.log; exit 1; }
	@grep '^deqfuse:' build/module.log || true

# A variant that is wrong or a bound that is missed fails the run, after the report is written.
# BENCH='--threads 1 -k brca' is passed on; BENCH_JSON is where the run is kept besides the report.
# Only a run without BENCH writes README.md's table, and only whole ones go to benchmarks/results.
BENCH ?=
BENCH_JSON ?= build/bench.json
# Not BENCH +=, which the command line's BENCH would beat.
BENCH_MODE :=
BENCH_README = $(if $(strip $(BENCH)),,--readme)
BENCH_OUT = $(if $(filter -k% -m%,$(BENCH)),--out build/results)
bench: module
	@echo "== Benchmarks: pytest benchmarks $(BENCH_MODE) $(BENCH)"
	@mkdir -p $(dir $(BENCH_JSON)); rm -f $(BENCH_JSON)
	@$(PY) -m pytest benchmarks -q --benchmark-quiet --benchmark-json=$(BENCH_JSON) $(BENCH_MODE) $(BENCH); status=$$?; \
	  $(PY) -m benchmarks.report $(BENCH_JSON) $(BENCH_OUT) $(BENCH_README) && exit $$status

bench-full: BENCH_MODE := --full
bench-full: bench

# docs/how-to/gpu-proof.md. Parts that have passed are not run again; logs and tables are in GPU_OUT.
PART ?=
GPU_OUT ?= build/gpu
gpu: has-gpu $(SETUP)
	@$(PY) -m tools.gpu_proof $(PART) --out $(GPU_OUT) $(if $(STATE),--state $(STATE)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(AGAIN),--again)

# The build first: it is done once, and without it CUDA's tests are skipped.
gpu-test: PART := build tests
gpu-bench: PART := build bench
gpu-test gpu-bench: gpu

has-gpu: check-python
	@$(BASE) -m tools.gpu_proof --check

ptx: module
	@echo "== Compiled kernels on the emulator: tests/ptxsim"
	@$(PY) -m pytest tests/ptxsim $(ARGS)

sanitize:
	@echo "== Kernels under sanitizers: tests/sanitize/run"
	@tests/sanitize/run

clean:
	rm -rf build dist deqfuse/_cpu.so deqfuse/_cuda.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# The Python that counts is the environment's own once it exists.
BASE = $(if $(wildcard $(PY)),$(PY),$(PYTHON))
check-python:
	@$(BASE) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "deqfuse needs Python 3.10 to 3.13; $(BASE) is $$($(BASE) -V 2>/dev/null || echo 'not there')." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
ifneq ($(origin PYTHON),file)
	@test "$$($(BASE) -V)" = "$$($(PYTHON) -V)" || { \
	  echo "$(VENV) holds $$($(BASE) -V): remove it or name another VENV to use $(PYTHON)." >&2; exit 1; }
endif

# The module is built in place, by the target above, hence DEQFUSE_BUILD=python in the installs below.
# setuptools and triton are pinned for the pinned torch; another asks for others, hence torch is
# named again beside setuptools. Python 3.10 and 3.11 put a setuptools that is too old into .venv.
# An interrupted set-up leaves no .installed and is taken up again where it stopped.
$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS) | check-python
	@echo "== Setting up $(VENV) with $$($(BASE) -V); later runs reuse it"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@{ grep -Ev '^torch==$(if $(filter $(PINNED),$(TORCH)),,|^(triton|setuptools)==)' $(CONSTRAINTS); echo '$(TORCH)'; } > $(VENV)/constraints.txt
	@echo "== Installing $(TORCH): 0.2 GB, or several GB where pip picks a CUDA build (TORCH_PIP chooses where from; top of Makefile)"
	@$(PY) -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt $(TORCH_PIP) torch
	@echo "== Installing what deqfuse builds and tests with"
	@$(PY) -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt torch '$(BUILT_WITH)'
	@DEQFUSE_BUILD=python $(PY) -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt \
	  --no-build-isolation -e '.[dev]'
	@touch $@

# What only some goals need, on top: .docs and .integrations are extras of pyproject.toml.
$(VENV)/.docs $(VENV)/.integrations: $(VENV)/.%: $(VENV)/.installed
	@echo "== Installing what '$*' needs"
	@DEQFUSE_BUILD=python $(PY) -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt \
	  --no-build-isolation -e '.[$*]'
	@touch $@

# Kernels and binaries are found only when installed, hence the editable install here too.
use-python: check-python
	@echo "== Using $$($(PYTHON) -V) and the packages that it has; the pinned versions do not apply"
	@missing=$$($(PY) -c 'import sys, importlib.util as u; \
	  print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' pip setuptools numpy); \
	  test -z "$$missing" || { echo "$(PYTHON) lacks $$missing. Without a network, on another machine:" >&2; \
	  echo "  pip download -d wheels$$(printf ' %s' $$missing | tr _ -)   # the same Python version and system" >&2; \
	  echo "and here: $(PYTHON) -m pip install --no-index --find-links wheels$$(printf ' %s' $$missing | tr _ -)" >&2; exit 1; }
	@$(PY) -c 'import sys, importlib.metadata as m; v = m.version("torch").split("."); \
	  sys.exit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null || { \
	  echo "VENV=none needs torch >= 2.11 in $(PYTHON); without VENV=none it is installed for you." >&2; exit 1; }
	@$(PY) -c 'import sys, importlib.util as u; sys.path.remove(""); s = u.find_spec("deqfuse"); \
	  sys.exit(not s or s.origin != "$(CURDIR)/deqfuse/__init__.py")' || { \
	  echo "== Installing deqfuse itself, editable, without dependencies or network"; \
	  DEQFUSE_BUILD=python $(PY) -m pip install --disable-pip-version-check -q --no-index --no-deps --no-build-isolation -e .; }
