# `make` lists what there is to make. Everything runs in .venv, which `make install` fills.

# The Python that .venv is made with: the first that really runs, is 3.11 or 3.12, and can make a venv.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	>/dev/null 2>&1 && echo "$$python" && break; done)
# Set TORCH_INDEX to the address of one of PyTorch's own indexes to get that build of torch, for instance
# the one without CUDA. Unset, pip takes torch from where it is configured to.
PIP_INSTALL = .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Written last: it stands for an install that went through. The other one marks an install that is under way.
STAMP := .venv/.installed
UNFINISHED := .venv/.unfinished

export OMP_NUM_THREADS ?= 1

.PHONY: help install pretrain test parity wheelhouse clean
.DEFAULT_GOAL := help

help:
	@echo "make install      make .venv with what megamed needs; an install that broke off is made again"
	@echo "                  PYTHON=...       the Python 3.11 or 3.12 to make it with"
	@echo "                  TORCH_INDEX=...  also look for torch there (PyTorch's index of CPU builds, say)"
	@echo "make pretrain     train the demonstration with 2 processes; ARGS='train.steps=10 ...' sets values"
	@echo "make test         ruff, mypy and the tests"
	@echo "make parity       measure every parallel layout against one process, and write docs/parity.md"
	@echo "make wheelhouse   download what a machine without a network needs to install megamed"
	@echo "                  EXTRAS=gpu           also Transformer Engine, flash-attn, ring-flash-attn"
	@echo "                  WITH_TORCH=1         also torch; by default the machine has its own"
	@echo "                  PYTHON_VERSION=3.12  its Python, and PLATFORM=aarch64 its architecture"
	@echo "make clean        remove caches and build output; .venv, runs/ and wheelhouse/ stay"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "megamed needs Python 3.11 or 3.12 with the module venv;" \
		"install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@if [ -e $(UNFINISHED) ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
		echo "==> making .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; fi
	@touch $(UNFINISHED)
	@echo "==> installing torch (the largest part: from 200 MB without CUDA to 3 GB with it)"
	@$(PIP_INSTALL) torch
	@echo "==> installing megamed and the rest"
	@$(PIP_INSTALL) -e '.[dev]'
	@rm -f $(UNFINISHED)
	@touch $@
	@echo "==> .venv is ready"

pretrain: install
	.venv/bin/torchrun --nproc-per-node 2 launch/pretrain.py +exp=fmri $(ARGS)

test: install
	@tools/install_slurm.sh
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder

parity: install
	.venv/bin/python -m pytest -q tests/parallel/test_parity.py --parity-table docs/parity.md

wheelhouse: install
	.venv/bin/python tools/wheelhouse.py $(if $(EXTRAS),--extras $(EXTRAS)) $(if $(WITH_TORCH),--with-torch) \
		$(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION)) $(if $(PLATFORM),--machine $(PLATFORM))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find conf launch megamed tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
