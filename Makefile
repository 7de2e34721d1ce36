# make demo    set up .venv if needed, then run the main job on the bundled model
# make test    set up .venv if needed, then run all tests
# make lint    ruff and mypy
# make bench   the benchmark of the fused layer
# make test-gpu, make bench-gpu   the same on an NVIDIA GPU; test-gpu also looks for memory errors
#
# PYTHON=/path/to/python3.11 chooses the interpreter, CXX the C++ compiler.  "READY= BIN=/usr/bin"
# runs with what is installed there, without .venv.

SHELL := /bin/sh
BIN := .venv/bin
READY := .venv/.ready

# A bare `make` must not surprise: it lists what there is.
help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(READY) compiler
	@$(BIN)/blockffn demo

test: $(READY) compiler arm
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) compiler
	$(BIN)/python -m benchmarks.first_light

gpu: $(READY) compiler
	@$(BIN)/python -m benchmarks.gpu --check

# compute-sanitizer is part of the CUDA toolkit; racecheck follows shared memory.  Without PyTorch's
# allocator every tensor has a block of its own, whose end memcheck knows.
test-gpu: gpu
	$(BIN)/python -m pytest tests/schedules/triton/on_gpu.py
	$(BIN)/python -m pytest tests/aot/on_gpu.py
	$(BIN)/python -m pytest tests/engines/on_gpu.py
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	      $(BIN)/python -m pytest tests/schedules/triton/on_gpu.py::test_memory \
	        tests/aot/on_gpu.py::test_error_is_within_eager || exit 1; \
	  done; \
	else echo "no compute-sanitizer here: memory errors were not looked for"; fi

bench-gpu: gpu
	$(BIN)/python -m benchmarks.gpu --json bench-gpu.json

compiler:
	@command -v $(CXX) >/dev/null || \
	  { echo "error: no C++ compiler ($(CXX)); install g++ or set CXX" >&2; exit 1; }

# The tests build for Arm and run that in an emulator.
arm:
	@for tool in cmake aarch64-linux-gnu-g++ qemu-aarch64-static; do \
	  command -v $$tool >/dev/null || { echo "error: the tests need $$tool; install" \
	    "cmake, g++-aarch64-linux-gnu and qemu-user-static (Debian's names)" >&2; exit 1; }; \
	done

# The stamp is written last, so an interrupted set-up is taken up again.
$(READY): requirements.lock pyproject.toml
	@for python in $(PYTHON) python3.11 python3 python; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  python=; \
	done; \
	[ -n "$$python" ] || { echo "error: no Python >= 3.11; install it or set PYTHON" >&2; exit 1; }; \
	$$python -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $$python lacks venv; install python3-venv" >&2; exit 1; }; \
	echo "setting up .venv (some minutes the first time)"; \
	$$python -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: help demo test lint bench gpu test-gpu bench-gpu compiler arm
