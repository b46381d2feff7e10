# `make run` boots Linux in this terminal, `make test` checks everything. Neither needs root.
# CONTRIBUTING.md says more about the targets.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help setup guest guest-bench run hello test lint conformance conformance-system programs fuzz boots bench bench-boot bench-scaling bench-pauses bench-live bench-restore bench-tracing bench-trace torture soak model profile clean distclean

help:
	@echo "make run         set up, fetch the guest, boot it in this terminal"
	@echo "make hello       set up and run the small assembly guest (needs no download of a guest)"
	@echo "make test        set up, fetch the guest, ruff, mypy, all tests"
	@echo "make setup       the set-up alone: $(VENV) with $(VENV)/bin/launcher"
	@echo "make guest       fetch and build the guest alone, into build/guest"
	@echo "make boots       20 boots in a row, with 64 MiB to 1 GiB, with APICs and without"
	@echo "make lint        ruff and mypy"
	@echo "make conformance 5 million random instructions against the host CPU (CASES=, SEED=, OUT=)"
	@echo "make conformance-system  privilege, paging, tasks, debugging, ... against QEMU and Unicorn (SCENARIOS=)"
	@echo "make programs    Debian's python3, gcc, node and others in the guest (PROGRAMS=perl,gcc)"
	@echo "make fuzz        coverage-guided fuzzing of decoder and translator for SECONDS=60 (needs atheris)"
	@echo "make bench       speed, measured against QEMU and the bare host (needs qemu-system-i386, gcc -m32)"
	@echo "make bench-boot  boot time, measured against QEMU (needs qemu-system-i386)"
	@echo "make bench-scaling  boot time and memory for guests of 64 MiB, 512 MiB and 2 GiB"
	@echo "make bench-pauses  pauses that a guest sees when devices are swapped and killed"
	@echo "make bench-live  what the devices' journals cost: the same machine with and without, in turn"
	@echo "make bench-tracing  what recording costs: the same machine without, with the flight recorder, to a file"
	@echo "make bench-trace  time and memory of the exports of a trace of a million records"
	@echo "make bench-restore  how long a restore takes, until the guest runs and until its shell answers"
	@echo "make torture     1,000 kills and 1,000 swaps under a guest that checks all it does (KILLS=, SWAPS=, SEED=, MINUTES=)"
	@echo "make soak        a fork storm for MINUTES=60: mappings and memory must stay flat"
	@echo "make model       every run of the protocol of live swap, up to a bound: states and transitions"
	@echo "make profile     where guest time goes, in a boot of Linux"
	@echo "make clean       remove what was built; distclean: the virtual environment too"

# Bytecode is made here: where PYTHONDONTWRITEBYTECODE is set no start would, and each would compile all sources.
setup: $(INSTALLED)
	@$(PY) -m compileall -q bus cpu_node devices launcher memory_node tracing

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one or say make PYTHON=..." >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null || \
	    { rm -rf $(VENV); echo "$(PYTHON) can make no virtual environment; install python3-venv" >&2; exit 2; }
	@echo "setup: installing into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

guest: setup
	@$(PY) -m launcher.guest

guest-bench: setup
	@$(PY) -m launcher.guest --bench

run: guest
	@$(VENV)/bin/launcher up machines/linux.toml

hello: setup
	@$(VENV)/bin/launcher up machines/hello.toml

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

# Without the guest its tests fail, the others still tell something. Several at a time: many wait more than they work.
JOBS ?= 2
test: lint
	@$(PY) -m launcher.guest --bench || true
	@$(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

# A run of another size than the default one leaves the committed table alone.
conformance: OUT ?= $(if $(CASES),build,docs)/conformance.md
conformance: setup
	@$(PY) -m tests.insn.conform $(if $(CASES),--cases $(CASES)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(MINUTES),--minutes $(MINUTES)) --out $(OUT)

# tests/bus/test_protocol.py has the smaller scenarios.
model: setup
	@$(PY) -m tests.bus.protocol_explore

SECONDS ?= 60

# A hang is an end, too: the input is then the one in build/fuzz-current.
fuzz: setup
	@$(PY) -c 'import atheris' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	@timeout --kill-after=5 $$(($(SECONDS) + 120)) $(PY) -m tests.fuzz.run_atheris -max_total_time=$(SECONDS) || \
	    { echo "fuzz: the last input is in build/fuzz-current; try: $(PY) -m tests.fuzz build/fuzz-current" >&2; exit 1; }

# All that the host's processor can't judge, against QEMU and Unicorn. Another size leaves the committed table alone.
conformance-system: setup
	@$(PY) -m tests.system.conformance $(if $(SCENARIOS),-n $(SCENARIOS),--document docs/system-conformance.md)

# Third-party programs from Debian's archive, in the guest, natively and under QEMU.
programs: guest
	@$(PY) -m bench.programs --only "$(PROGRAMS)"

boots: guest
	@BOOTS=20 $(PY) -m pytest -s tests/machine/test_boots.py -k in_a_row

bench: guest-bench
	@$(PY) -m bench.compare $(BENCH_ARGS)

bench-boot: guest
	@$(PY) -m bench.boot $(BENCH_ARGS)

bench-scaling: guest
	@$(PY) -m bench.scaling $(BENCH_ARGS)

bench-pauses: setup
	@$(PY) -m bench.pauses $(BENCH_ARGS)

bench-live: guest
	@$(PY) -m bench.checkpoints $(BENCH_ARGS)

bench-tracing: guest
	@$(PY) -m bench.tracing $(BENCH_ARGS)

bench-restore: guest
	@$(PY) -m bench.restores $(BENCH_ARGS)

bench-trace: setup
	@$(PY) -m bench.trace_export $(BENCH_ARGS)

# Another size leaves the committed table alone.
torture: guest
	@$(PY) -m bench.torture $(if $(KILLS),--kills $(KILLS)) $(if $(SWAPS),--swaps $(SWAPS)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(DEVICES),--devices $(DEVICES)) $(if $(MINUTES),--minutes $(MINUTES)) \
	    $(if $(KILLS)$(SWAPS)$(DEVICES)$(MINUTES),,--document docs/live-swap.md) $(BENCH_ARGS)

soak: guest
	@$(PY) -m bench.soak --minutes $(or $(MINUTES),60) $(BENCH_ARGS)

profile: guest
	@$(PY) -m bench.profile $(PROFILE_ARGS)

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean
	rm -rf $(VENV)
