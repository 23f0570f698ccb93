# Two commands on a fresh machine: `make demo` and `make test`. `make run` opens the app.

PYTHON ?= python3
# More than the cores of the smallest CI machine: a third of the tests' time is spent waiting for other processes.
WORKERS ?= 3
# Set in many containers. Each of a thousand child processes of the tests would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

LOCK := requirements-dev.lock
# Not in the lock: torch, whose build is the machine's choice, and what it brings along.
NOT_LOCKED := torch triton setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cccl \
	cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 \
	nvjitlink nvshmem-cu13 nvtx)

.PHONY: check-recipes real-clients real-cluster check-models help demo test test-fast check check-kernels run docs screenshots real-models real-exports real-bases real-sweep bench-deps lock clean

help:
	@echo "make demo         fine-tune a real small model, and see it work"
	@echo "make run          open the app"
	@echo "make test         run every test"
	@echo "make test-fast    the tests that take milliseconds: under a minute on 2 cores"
	@echo "make check        lint, formatting, types, architecture"
	@echo "make check-kernels compile the Triton kernels for each supported GPU, without one (fetches 0.5 GB)"
	@echo "make check-models train a tiny model of each type that transformers builds, and list what came of it"
	@echo "make check-every-model the tests that walk over models, with all of them: make test takes those unlike"
	@echo "make check-recipes let axolotl's schema read exported recipes (fetches 10 MB)"
	@echo "make docs         write the generated pages of docs/: settings, commands, keys, manual page"
	@echo "make screenshots  draw the pictures of README and docs, from recorded runs"
	@echo "make real-models  train two real models beside a plain script, step by step (fetches 0.3 GB)"
	@echo "make real-exports train the demo, export it as GGUF and LoRA, and compare the files through llama.cpp"
	@echo "make real-bases   compare two real GGUF files, as bases and after training, with llama.cpp (fetches 0.3 GB)"
	@echo "make real-sweep   a sweep of the learning rate on the demo's model, with its verdict"
	@echo "make real-clients serve the demo's run to litellm and lm-evaluation-harness (fetches 0.2 GB)"
	@echo "make real-cluster train jobs on a Slurm cluster of one node, killed and requeued (root; fetches 5 MB of packages)"
	@echo "make lock         update the locked dependencies, with the hash of each file"
	@echo "make bench-deps   what only the benchmarks need, in an environment of its own"

$(INSTALLED): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/qlora-tui demo

run: $(INSTALLED)
	@$(BIN)/qlora-tui

test: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

# Two workers: a third would import as much as the others, for tests that wait for nothing.
test-fast: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The kernels of the fused parts, compiled for each GPU by the Triton of the oldest and of a recent torch: no GPU needed.
TRITONS := 3.2 3.9

.triton/%: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part "triton==$*.*"
	mv $@.part $@

check-kernels: $(addprefix .triton/,$(TRITONS))
	@set -e; for triton in $^; do echo "Triton $${triton#.triton/}"; \
		PYTHONPATH=$(CURDIR)/$$triton $(BIN)/pytest -n 2 -q tests/kernels; done

check-models: $(INSTALLED)
	$(BIN)/python -m bench.model_types --out docs/reference/models.json; status=$$?; $(BIN)/python -m docs.generate; exit $$status

check-every-model: $(INSTALLED)
	EVERY_MODEL=1 $(BIN)/pytest -n 2 --dist loadgroup -m every_model $(shell grep -rl walks_over_models tests --include='test_*.py')

# Its schema needs none of axolotl's other dependencies.
AXOLOTL := axolotl==0.19.0 pillow==13.0.0

.axolotl: | $(INSTALLED)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part $(AXOLOTL)
	mv $@.part $@

check-recipes: .axolotl
	AXOLOTL=$(CURDIR)/.axolotl $(BIN)/pytest -q tests/recipe/test_exported.py

docs: $(INSTALLED)
	$(BIN)/python -m docs.generate

screenshots: $(INSTALLED)
	$(BIN)/python -m screenshots.make

real-models: $(INSTALLED)
	@echo "Gemma 3 270M is under the Gemma Terms of Use (ai.google.dev/gemma/terms): by fetching it you accept"
	@echo "them. It is kept in this machine's cache, and must not be passed on without those terms."
	$(BIN)/python -m bench.real_models

real-exports: demo
	$(BIN)/python -m bench.real_exports

real-bases: $(INSTALLED)
	$(BIN)/python -m bench.real_bases

real-sweep: $(INSTALLED)
	$(BIN)/python -m bench.real_sweep

# In a separate environment: the clients' requirements must not determine our versions.
CLIENTS := litellm==1.110.2 lm_eval[api]==0.4.13 transformers<5.25

.clients-venv/.installed: Makefile
	$(PYTHON) -m venv .clients-venv
	.clients-venv/bin/python -m pip install --quiet --disable-pip-version-check $(foreach each,$(CLIENTS),'$(each)')
	@touch $@

real-clients: demo .clients-venv/.installed
	$(BIN)/python -m bench.real_clients --clients .clients-venv/bin/python

# Debian's packages, unpacked in a folder and not installed.
SLURM := slurmctld slurmd slurm-client slurm-wlm-basic-plugins libmunge2 libjwt2 libb64-0d libjson-c5 liblua5.1-0 \
	libhwloc15 libnuma1 libreadline8t64 libyaml-0-2 libdbus-1-3 liblz4-1 libpam0g

.slurm:
	mkdir $@.part
	cd $@.part && apt-get download -q $(SLURM)
	mv $@.part $@

real-cluster: $(INSTALLED) .slurm
	SLURM_PACKAGES=$(CURDIR)/.slurm $(BIN)/pytest -q tests/training/test_slurm.py tests/export/test_jobs.py

bench-deps:
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt

lock:
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.lock-venv/bin/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --upgrade --quiet \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		$(addprefix --no-emit-package ,$(NOT_LOCKED)) --output-file $(LOCK)

clean:
	rm -rf $(VENV) .triton .axolotl .slurm .bench-venv .lock-venv .clients-venv .mypy_cache .ruff_cache .pytest_cache build dist
