# Every target makes its own environment first: Python >= 3.10 with headers, g++, make and a package
# index are all it takes. Stamp files in $(VENV) let the second run start at once.
#
#   make demo PYTHON=python3.12        another interpreter
#   make demo TORCH=torch==2.12.0      another torch
#   make demo ARGS=--help              options of the script

PYTHON ?= python3
VENV ?= .venv
# Pinned, so that what is installed today is what was measured.
TORCH ?= torch==2.13.0
ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: help demo demo-vlm test lint bench clean

help:
	@echo "make demo      a masked-diffusion model in W4A4 beside float, on the CPU (minutes)"
	@echo "make demo-vlm  a vision-language model: questions about pictures, answers saved as a PNG"
	@echo "make test      the tests that need no GPU; those of the HTML report need Chromium (apt-get install chromium),"
	@echo "               without it: make test BROWSER=no"
	@echo "make lint      ruff, and mypy on the installed package"
	@echo "make bench     CPU speed and storage, checked against what the README promises"

demo: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/demo_dllm.py $(ARGS)

demo-vlm: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/demo_vlm.py $(ARGS)

# A process for each core, of one thread. Those in a browser wait for what it draws: after the others, alone.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "not gpu and not browser" -n auto -ra --durations=10 $(ARGS)
ifneq ($(BROWSER),no)
	$(VENV)/bin/pytest -m browser -ra
endif

# Why a copy: in the checkout freeact_fx has no folders passes and codegen; installed, it has.
lint: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	rm -rf build
	$(PIP) install --quiet --no-deps --target build/installed .
	cd build/installed && $(abspath $(VENV))/bin/mypy --config-file ../../pyproject.toml -p freeact_fx

bench: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/cpu_linear.py --check $(ARGS)
	$(VENV)/bin/python benchmarks/cpu_dllm_step.py --check $(ARGS)
	$(VENV)/bin/python benchmarks/storage.py --check $(ARGS)

clean:
	rm -rf $(VENV) .cache build out

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable ".[hf,cli,bench]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) install --editable ".[hf,cli,bench,test]"
	touch $@
