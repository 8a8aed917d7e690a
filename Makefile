# quantal: the commands of the README. Every target sets up what it needs; see scripts/setup.sh.
#
#   make demo         set up, build, and run the main job on a real model (build/demo/report.*)
#   make test         set up, build, and run all tests (C++ and Python; no upstream package needed)
#   make conformance  live tests against the real upstream packages, in their own environment
#   make bench        tables of bench/results, measured against the rivals on this machine
#   make docs         reference of the interfaces as HTML, build/docs/html/index.html
#   make lint         clang-format, clang-tidy, ruff, mypy
#   make sanitize     C++ tests under AddressSanitizer and UBSan, those of threads under ThreadSanitizer
#   make neon         C++ tests of core, kernels and formats for 64-bit ARM, cross-compiled, run under qemu
#   make install      C++ library, cli and CMake package into PREFIX (default build/install)
#   make clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
PREFIX ?= build/install
VENV := .venv
PY := $(VENV)/bin/python
CMAKE := $(VENV)/bin/cmake
CTEST := $(VENV)/bin/ctest
BUILD := build/release
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test test-cpp test-python conformance bench bench-programs docs lint sanitize neon install configure package setup clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready
$(VENV)/.ready: scripts/setup.sh scripts/requirements.txt
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash scripts/setup.sh $(VENV)

configure: setup
	@mkdir -p build
	$(CMAKE) -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DQUANTAL_BUILD_TORCH=ON \
	  -DQUANTAL_BUILD_EXAMPLES=ON -DPython3_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')" > $(BUILD).log 2>&1 \
	  || { cat $(BUILD).log; exit 1; }

# The Python package, compiled against the torch of the environment.
package: setup
	$(PY) -m pip install -q --no-build-isolation --no-deps -C build-dir=build/python .

demo: package configure
	$(CMAKE) --build $(BUILD) --target finetune
	$(PY) examples/demo.py --output build/demo --finetune-binary $(BUILD)/examples/finetune

test: test-cpp test-python

test-cpp: configure
	$(CMAKE) --build $(BUILD)
	$(CTEST) --test-dir $(BUILD) --output-on-failure -j 2

test-python: package configure
	$(CMAKE) --build $(BUILD) --target finetune quantal_test_device
	$(PY) -m pytest tests/python

conformance: setup
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash scripts/conformance.sh

bench-programs: configure
	$(CMAKE) -S . -B $(BUILD) -DQUANTAL_BUILD_BENCH=ON > $(BUILD).log
	$(CMAKE) --build $(BUILD) --target example_generate call_overhead

bench: package bench-programs
	bash scripts/bench.sh

docs: package
	bash scripts/docs.sh

lint: setup
	bash scripts/lint.sh

sanitize: setup
	@mkdir -p build
	$(CMAKE) --preset asan-ubsan -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja > build/asan-ubsan.log
	$(CMAKE) --build build/asan-ubsan
	$(CTEST) --test-dir build/asan-ubsan --output-on-failure -j 2
	$(CMAKE) --preset tsan -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja > build/tsan.log
	$(CMAKE) --build --preset tsan
	$(CTEST) --preset tsan

neon:  # needs no environment and installs nothing
	bash scripts/neon.sh

install: configure
	$(CMAKE) --build $(BUILD)
	$(CMAKE) --install $(BUILD) --prefix $(PREFIX)

clean:
	rm -rf build
