# Every target works in a clean clone: it makes its own environment in $(VENV) first.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
CPP_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp python_bindings/*.cpp)
SHARE = 0.04
DIGITS := --config configs/digits.yaml
# What the kernels compute, without their plain PyTorch twin: it has no instruction sets.
KERNEL_TESTS := $(addprefix tests/test_,forward.py backward.py double_backward.py layout.py fuzz.py streams.py sweep.py)
KERNEL_PYTEST := -m pytest -k "not reference"
ISAS = $(shell $(RUN)/python -c "from metapool_kernels import numpy_api; print(*numpy_api.isa_names())")
SANITIZED_TESTS := $(addprefix tests/test_,forward.py backward.py streams.py sweep.py)
SANITIZED := build/sanitized
# -O1 keeps the build within minutes, and so does leaving out what does no more than repeat
# AddressSanitizer (null pointers, object sizes): every kernel is one large function.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	-fno-sanitize=null,object-size,vptr,pointer-overflow \
	--param asan-instrumentation-with-call-threshold=0 -fno-omit-frame-pointer -g1 -O1

.PHONY: test test-isas test-interpreter test-sanitized search bench bench-report gpu-check \
	gpu-model lint format install clean

test: install  ## the whole test suite
	METAPOOL_REQUIRE_NATIVE=1 $(RUN)/python -m pytest tests

test-isas: install  ## the kernels' tests under each instruction set that this machine has
	test -n "$(ISAS)"
	set -e; for isa in $(ISAS); do echo "-- $$isa"; METAPOOL_REQUIRE_NATIVE=1 METAPOOL_ISA=$$isa \
		$(RUN)/python $(KERNEL_PYTEST) $(KERNEL_TESTS); done

test-interpreter: install  ## a share of the kernels' tests in Triton's interpreter; SHARE=1 for all
	TRITON_INTERPRET=1 METAPOOL_TEST_SHARE=$(SHARE) $(RUN)/python -m pytest tests -m kernel

# A copy of the tree is built, so that the libraries in this one stay as they are.
test-sanitized: install  ## the same with AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	mkdir -p $(SANITIZED)
	tar c --exclude='*.so' --exclude=__pycache__ csrc python_bindings metapool_kernels tests \
		setup.py pyproject.toml README.md LICENSE | tar x -C $(SANITIZED)
	cd $(SANITIZED) && CXX=g++ METAPOOL_CXXFLAGS="$(SANITIZERS)" $(abspath $(RUN))/python \
		setup.py build_ext --inplace
	set -e; cd $(SANITIZED); for isa in $(ISAS); do echo "-- $$isa"; \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
		METAPOOL_REQUIRE_NATIVE=1 METAPOOL_ISA=$$isa \
		$(abspath $(RUN))/python $(KERNEL_PYTEST) --capture=sys $(SANITIZED_TESTS); done

search: install  ## search, adapt and evaluate on scikit-learn's digits
	$(RUN)/metapool search $(DIGITS) --overwrite
	$(RUN)/metapool adapt $(DIGITS)
	$(RUN)/metapool evaluate $(DIGITS)

bench: install  ## our op against its peers; QUICK=--quick for under a minute
	$(RUN)/python -m pytest benches --benchmark-only $(QUICK)

bench-report: install  ## the full report under benches/results; QUICK=--quick for under 90 s
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[search,bench]"
	$(RUN)/python -m benches.report $(QUICK)

gpu-check: ## everything that only a GPU can tell, into benches/results; DRY=--dry-run without one
	$(PYTHON) -m benches.gpu_check $(DRY)

gpu-model: install  ## what the Triton kernels' machine code should reach on a GPU
	$(RUN)/python -m benches.gpu_model

lint: $(VENV)/.installed  ## ruff, mypy and clang-format
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.installed  ## what lint can mend by itself
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CPP_SOURCES)

install: $(VENV)/.installed

# torch comes first: the package is built against the very torch that it will run with, instead of
# a second copy in an isolated build environment.
$(VENV)/.installed: pyproject.toml setup.py $(CPP_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet "torch>=2.10" numpy "setuptools>=77" ninja pybind11
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[search,test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info metapool_kernels/*.so metapool_kernels/_build.json
