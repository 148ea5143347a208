# make demo   a fresh machine with Python 3.12: installs into .venv and runs the toy chain, raw text to HF checkpoint
# make test   everything but what is slow by nature; .ci/run adds that with make test-slow
# make test-slurm   the cluster path on a real Slurm of this machine's own; needs root and apt
# make bench-throughput   tokens per second beside Megatron-Bridge's own entry point
# make bench-data   data preparation side by side with its peers; with Megatron-LM's too where MEGATRON_LM is its checkout

PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# The machine's own certificates, for proxies; bytecode now, or each process compiles anew what PYTHONDONTWRITEBYTECODE
# does not let it keep
UV_INSTALL := $(UV) pip install --quiet --system-certs --compile-bytecode --python $(BIN)/python
JOBS ?= 2

.PHONY: demo install install-dev test test-slow test-slurm lint format bench-data bench-throughput lock clean

demo: install
	$(BIN)/snakemake hf_export/nano3-tiny

install: $(VENV)/installed
$(VENV)/installed: envs/requirements.txt envs/requirements-megatron.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(UV_INSTALL) -r envs/requirements.txt
	$(UV_INSTALL) --no-deps -r envs/requirements-megatron.txt --editable .
	touch $@

install-dev: $(VENV)/installed-dev
$(VENV)/installed-dev: $(VENV)/installed envs/requirements-dev.txt
	$(UV_INSTALL) -r envs/requirements-dev.txt
	touch $@

test: lint
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		(apt-get update -q && apt-get install -yq --no-install-recommends chromium) || echo "no Chromium: its tests are skipped"
	$(BIN)/python -m pytest -m "not slow and not slurm" -n $(JOBS)

test-slow: install-dev
	$(BIN)/python -m pytest -m "slow and not slurm" -n $(JOBS) --dist loadfile

test-slurm: install-dev
	command -v slurmctld >/dev/null && ls /usr/lib/*/libfuse.so.2 >/dev/null || \
		(apt-get update -q && apt-get install -yq --no-install-recommends munge slurm-client slurmctld slurmd libfuse2)
	tests/slurm/run

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

bench-data: install-dev
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.chats
	$(BIN)/python -m benchmarks.plan

bench-throughput: install
	$(BIN)/python -m benchmarks.throughput

lock: install-dev
	$(UV) pip compile -q --system-certs --python 3.12 --no-emit-index-url --no-header envs/requirements.in -o envs/requirements.txt
	cd envs && ../$(UV) pip compile -q --system-certs --python 3.12 --no-emit-index-url --no-header requirements-dev.in -o requirements-dev.txt

clean:
	rm -rf $(VENV) .snakemake .pytest_cache .ruff_cache build *.egg-info
