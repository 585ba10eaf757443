# Everything from a fresh clone with python3, make and a network:
#   make run     train the default recipe on CIFAR-10 and score it
#   make test    the whole test suite
#   make check   format, lint, strict types, import direction
#   make compare six pairs of batch against none, with a verdict
#   make docs    the documentation site, into site/; it opens from that folder, too
#   make bench   normlab beside Keras, PyTorch and ONNX Runtime; QUICK=1 takes under five minutes
#   make profile where the time of a training step goes, pass by pass
#   make soak    longer tests
#   make wheel   the wheel of what is committed, what auditwheel says of it, tried in an environment of its own
#   make torture kill 240 trainings and studies, let every write fail, count what survives
#   make ranks   kill one of two processes of a training 30 times, count what survives
#   make attack  hostile files and clients, counted: tried and survived
#   make fuzz    a million changed files for each parser written here, 100,000 for the libraries'
#
# PyTorch comes as its CPU build, whose place uv knows; where that cannot be reached, as pip finds it.
# TORCH_BACKEND=auto (or cu128, …) takes the build for a GPU, TORCH_INDEX=URL another package index.

PYTHON ?= python3
TORCH_BACKEND ?= cpu
VENV ?= .venv
BENCH ?= .venv-bench
WHEEL ?= build/wheel
BIN := $(VENV)/bin
INSTALL := -m pip install --disable-pip-version-check --quiet --constraint
PIP := $(BIN)/python $(INSTALL) constraints.txt
BENCH_PIP := $(BENCH)/bin/python $(INSTALL) $(BENCH)/constraints.txt
# Given an environment's Python and its pip.
TORCH = torch=$$(grep '^torch==' constraints.txt) && \
	{ test -z "$(TORCH_INDEX)" && $(2) uv && $(1) -m uv pip install --quiet --python $(1) \
	--torch-backend $(TORCH_BACKEND) "$$torch" 2>/dev/null; } || \
	$(2) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch"
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard src/normlab/kernels/*.[ch])

.PHONY: run compare docs wheel bench bench-scale test check soak torture ranks attack fuzz clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	@NORMLAB_INSTALL_SECONDS=$$(cat $(VENV)/.installed) $(BIN)/normlab train $(ARGS)
	@echo "(. $(BIN)/activate makes normlab a command of this shell)"

compare: $(VENV)/.installed
	$(BIN)/normlab compare --arms batch,none --seeds 6 $(ARGS)

docs: $(VENV)/.documented
	$(BIN)/python scripts/build_site.py $(ARGS)

bench: $(BENCH)/.installed
	@echo "The environment took $$(cat $(BENCH)/.installed) s to install, when it was."
	$(BENCH)/bin/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

# Three at a time on two cores: some tests wait for a silence, a signal or a process to end.
test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not soak" $(ARGS)

check: $(VENV)/.checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(VENV)/.tested
	$(BIN)/python -m pytest -m soak --timeout 1200 $(ARGS)

# Neither the working tree nor an installed normlab has a part in it. The last step is run in an empty
# folder. cibuildwheel gives wheels that are published their manylinux tag.
wheel:
	rm -rf $(WHEEL)
	mkdir -p $(WHEEL)/source $(WHEEL)/empty
	git archive HEAD | tar -x -C $(WHEEL)/source
	$(PYTHON) -m venv $(WHEEL)/tools
	$(WHEEL)/tools/bin/python $(INSTALL) constraints.txt build auditwheel
	$(WHEEL)/tools/bin/python -m build --wheel --outdir $(WHEEL) $(WHEEL)/source >$(WHEEL)/build.log
	$(WHEEL)/tools/bin/auditwheel show $(WHEEL)/*.whl
	$(PYTHON) -m zipfile --list $(WHEEL)/*.whl
	$(PYTHON) -m venv $(WHEEL)/fresh
	$(call TORCH,$(WHEEL)/fresh/bin/python,$(WHEEL)/fresh/bin/python $(INSTALL) constraints.txt)
	$(WHEEL)/fresh/bin/python $(INSTALL) constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL)/empty && ../fresh/bin/normlab --version && \
	../fresh/bin/normlab train --data sample --epochs 1

profile: $(VENV)/.installed
	$(BIN)/python -m benchmarks.passes $(ARGS)

torture: $(VENV)/.tested
	$(BIN)/python tests/torture.py $(ARGS)

ranks: $(VENV)/.tested
	$(BIN)/python tests/ranks.py $(ARGS)

bench-scale: $(VENV)/.tested
	$(BIN)/python -m benchmarks.scale $(ARGS)

attack: $(VENV)/.tested
	$(BIN)/python tests/attack $(ARGS)

fuzz: $(VENV)/.tested
	$(BIN)/python tests/fuzz/run.py $(or $(ARGS),all)

clean:
	rm -rf $(VENV) $(BENCH) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The file's content is how many seconds the installation took; `make run` tells it at the end.
$(VENV)/.installed: $(BIN)/python $(INPUTS)
	@echo "Installing into $(VENV): PyTorch's CPU build, about 190 MB to fetch (where that cannot be"
	@echo "reached, what pip finds: up to 3 GB on Linux), and about 110 MB of other packages; 1.3 GB"
	@echo "on the disk. Then CIFAR-10, once, into your cache folder: 139 to 170 MB."
	@start=$$(date +%s) && \
	$(call TORCH,$(BIN)/python,$(PIP)) && \
	$(PIP) --editable . && \
	echo $$(( $$(date +%s) - start )) > $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.checked: $(VENV)/.tested
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

# An environment of its own: TensorFlow wants another h5py than the tests have. Of two constraints
# on a package, the benchmark's counts.
$(BENCH)/.installed: $(INPUTS) benchmarks/constraints.txt
	@echo "Installing into $(BENCH): what $(VENV) has, and TensorFlow, about 250 MB more to fetch."
	@start=$$(date +%s) && \
	$(PYTHON) -m venv $(BENCH) && \
	awk -F== '!seen[$$1]++' benchmarks/constraints.txt constraints.txt >$(BENCH)/constraints.txt && \
	$(call TORCH,$(BENCH)/bin/python,$(BENCH_PIP)) && \
	$(BENCH_PIP) --editable '.[bench]' && \
	echo $$(( $$(date +%s) - start )) > $@
