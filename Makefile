# make demo: the main job on data it makes itself;  make test: lint, types and all tests;  make docs: the documentation,
# in site/. All make the venv they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# in the order of the folders: the files with few, long tests come first, so that no core waits at the end
FILES := --dist loadfile --no-loadscope-reorder
# order, worlds, resume, faults, what is saved and exported, streams from elsewhere, launchers, its benchmarks
ENGINE := $(addprefix tests/,distributed faults cluster shards/remote msmil/engine/bench \
    $(addprefix benchmarks/test_,manifest.py order.py saving.py) \
    $(addprefix shards/test_,balance.py codecs.py exams.py plan.py reader.py slots.py stream.py subset.py workers.py) \
    $(addprefix msmil/engine/test_,ahead.py bf16.py checkpoint.py compiled.py elsewhere.py engine_settings.py export.py \
        memory.py run_folder.py runtime.py saving.py started_again.py tracking.py watchdog.py) \
    $(addprefix launch/test_,bench_command.py bench_scaling.py cause.py doctor_collectives.py export_command.py forwarding.py \
        train_elsewhere.py))

# the tests start hundreds of processes, and each would compile what it imports
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-covered test-fast test-engine lint types docs figures install clean

demo: install
	$(BIN)/msmil demo

# Many of the slow tests wait (for a rank that hangs, for SLURM): three at a time keep two cores busy.
test: install
	$(MAKE) --no-print-directory --jobs 3 lint types test-covered
	$(BIN)/python -m pytest -n 3 $(FILES) -m slow --durations=10

# Coverage makes Python slower by a third to a half. It is measured where it says most: the slow tests start processes,
# which it does not see.
test-covered: install
	$(BIN)/python -m pytest -n 2 $(FILES) -m "not slow" --cov --cov-report=term

test-fast: install
	$(BIN)/python -m pytest -n 2 $(FILES) -m "not slow"

# of both kinds, the fast and the slow, what concerns the engine
test-engine: install
	$(BIN)/python -m pytest -n 3 $(FILES) $(ENGINE) --durations=10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy --num-workers 2

# the theme's authors print a notice about its future unless they are asked not to; warnings of ours are errors
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# draws docs/images again; needs the two runs of docs/concepts.md
figures: install
	$(BIN)/python docs/figures/method.py
	$(BIN)/python docs/figures/maps.py result runs/demo
	$(BIN)/python docs/figures/maps.py compare runs/demo runs/demo_settrans

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "msmil needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,deepspeed,export,remote]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
