# Every target works in a clean clone: it makes its own environment in $(VENV) first, with as much as
# it needs.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
CPP_SOURCES := $(wildcard $(addprefix csrc/*,.h /*.h /*.cpp /*.cu /*.cuh) python_bindings/*.h \
	python_bindings/*.cpp)
TEST_SOURCES := $(wildcard tests/*.h tests/cuda_host/*.h tests/threads/*.cpp tests/arm/*.cpp benches/*/*.cpp)
SHARE = 0.03
WHEEL_TORCH = 2.13.0
# The GPUs that a wheel with CUDA serves, and by PTX those to come.
WHEEL_ARCHS := 75;80;86;89;90;100;120+PTX
SEARCH := --config configs/mnist.yaml
# What the kernels compute, without their plain PyTorch twin: it has no instruction sets.
KERNEL_TESTS := $(addprefix tests/op/test_,forward.py backward.py double_backward.py layout.py fuzz.py streams.py sweep.py)
KERNEL_PYTEST := -m pytest -k "not reference"
PYTEST = METAPOOL_REQUIRE_NATIVE=1 $(RUN)/python -m pytest
PROCESSES = logical
# Every run leaves a report, which `make checked` takes in.
REPORT = --junitxml=$(abspath build/checked/$(1).xml)
ISAS = $(shell $(RUN)/python -c "from metapool_kernels import numpy_api; print(*numpy_api.isa_names())")
WIDEST = $(lastword $(ISAS))
SANITIZED_TESTS := $(addprefix tests/op/test_,forward.py backward.py streams.py sweep.py \
	double_backward.py numpy.py addresses.py)
SANITIZED := build/sanitized
SANITIZED_SHARE = 1
ORDERS_SHARE = 1
SANITIZER_SETUP = METAPOOL_REQUIRE_NATIVE=1 UBSAN_OPTIONS=print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
HOST_LIBRARY = $(abspath build/$(1)/_torch_ops_cuda_host.so)
HOST_TESTS := $(addprefix tests/op/test_,forward.py backward.py fuzz.py addresses.py)
# Tests of the op, but for those of what runs CUDA on the CPU: they are the same everywhere.
OP_PYTEST := -m pytest tests -m kernel \
	$(addprefix --ignore tests/,search cuda/test_cuda_host.py cuda/test_cuda_code.py \
	house/test_mutation.py packaging/test_compatibility.py)
# -O1 keeps the build within minutes, and so does leaving out what does no more than repeat
# AddressSanitizer (null pointers, object sizes): every kernel is one large function.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	-fno-sanitize=null,object-size,vptr,pointer-overflow \
	--param asan-instrumentation-with-call-threshold=0 -fno-omit-frame-pointer -g1 -O1

.PHONY: test test-all test-rest test-rest-op test-rest-search test-isas test-interpreter \
	test-cuda-host test-cuda-host-sanitized test-sanitized test-older test-compatibility \
	test-devices test-callbacks test-threads test-arm test-slow test-large wheel wheel-arm \
	fuzz mutate checked search bench bench-import bench-report \
	bench-search gpu-check gpu-pack gpu-model lint format install clean

test: $(VENV)/.installed  ## a case of each kind, some minutes on two cores
	$(PYTEST) tests --part quick --numprocesses $(PROCESSES) --maxprocesses 8 --dist worksteal \
		$(call REPORT,$@)

test-all: test test-rest  ## the whole test suite

test-rest: test-rest-op test-rest-search  ## what test leaves out; with --jobs=2 beside each other

test-rest-op: $(VENV)/.installed  ## of that, all but the search
	$(PYTEST) tests --ignore=tests/search --part rest $(call REPORT,$@)

test-rest-search: $(VENV)/.installed  ## of that, the search
	$(PYTEST) tests/search --part rest $(call REPORT,$@)

test-isas: $(VENV)/.installed  ## the kernels' tests under each instruction set but the widest, which test has
	test -n "$(ISAS)"
	set -e; for isa in $(filter-out $(WIDEST),$(ISAS)); do echo "-- $$isa"; METAPOOL_REQUIRE_NATIVE=1 METAPOOL_ISA=$$isa \
		$(RUN)/python $(KERNEL_PYTEST) $(KERNEL_TESTS) $(call REPORT,$@-$$isa); done

test-interpreter: $(VENV)/.installed  ## a share of the kernels' tests in Triton's interpreter; SHARE=1 for all
	TRITON_INTERPRET=1 METAPOOL_TEST_SHARE=$(SHARE) $(RUN)/python -m pytest tests -m kernel $(call REPORT,$@)

# Of the other orders the last has the shared memory of Turing, where lanes of halves have fewer columns.
test-cuda-host: $(VENV)/.installed  ## the CUDA kernels on the CPU, threads in random order, the kernels' tests in two more
	$(RUN)/python -m tests.cuda_host.build
	set -e; for order in random forward reversed; do echo "-- $$order"; \
		test $$order = random && tests="$(OP_PYTEST)" share=1 || \
			tests="-m pytest $(HOST_TESTS)" share=$(ORDERS_SHARE); \
		test $$order = reversed && export METAPOOL_HOST_SHARED=65536; \
		METAPOOL_TEST_SHARE=$$share METAPOOL_REQUIRE_NATIVE=1 METAPOOL_CUDA_HOST=$(call HOST_LIBRARY,cuda_host) \
		METAPOOL_HOST_ORDER=$$order $(RUN)/python $$tests $(call REPORT,$@-$$order); done

# A copy of the tree is built, so that the libraries in this one stay as they are.
test-sanitized: $(VENV)/.installed  ## the widest with AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	mkdir -p $(SANITIZED)
	tar c --exclude='*.so' --exclude=__pycache__ csrc python_bindings metapool_kernels tests \
		setup.py pyproject.toml README.md LICENSE | tar x -C $(SANITIZED)
	cd $(SANITIZED) && METAPOOL_BUILD_CUDA=0 METAPOOL_ISAS=$(WIDEST) CXX=g++ \
		METAPOOL_CXXFLAGS="$(SANITIZERS)" $(abspath $(RUN))/python setup.py build_ext --inplace
	cd $(SANITIZED) && $(SANITIZER_SETUP) METAPOOL_ISA=$(WIDEST) \
		$(abspath $(RUN))/python $(KERNEL_PYTEST) --capture=sys $(SANITIZED_TESTS) \
		$(call REPORT,$@)

# Whether 8,192 planes drift is a matter of numbers, and takes as long as most of the rest.
test-cuda-host-sanitized: $(VENV)/.installed  ## the kernels' tests there under both sanitizers; SANITIZED_SHARE=0.1 for a tenth
	$(RUN)/python -m tests.cuda_host.build --sanitize
	$(SANITIZER_SETUP) METAPOOL_TEST_SHARE=$(SANITIZED_SHARE) \
		METAPOOL_CUDA_HOST=$(call HOST_LIBRARY,cuda_host_sanitized) METAPOOL_HOST_ORDER=random \
		$(RUN)/python -m pytest -k "not many_planes" $(HOST_TESTS) --capture=sys $(call REPORT,$@)

test-older: $(VENV)/.installed  ## the wheel under torch 2.13.0 (CPU build), the sdist without a compiler
	$(RUN)/python -m tests.compatibility --quick --torch 2.13.0 \
		--packages sdist-no-compiler --record $@

test-compatibility: $(VENV)/.installed  ## torch 2.10 to the newest, Python 3.10 to 3.13, the lowest version of every package, wheel and sdist; an hour or two
	$(RUN)/python -m tests.compatibility $(COMPATIBILITY)

# Its name says the oldest system that it runs on, which that of this machine decides.
wheel: $(VENV)/.installed-wheel  ## a manylinux wheel for this Python into dist, tested in an empty environment; METAPOOL_BUILD_CUDA=1 for CUDA too
	METAPOOL_BUILD_CUDA=$${METAPOOL_BUILD_CUDA:-0} METAPOOL_CUDA_ARCHS="$${METAPOOL_CUDA_ARCHS:-$(WHEEL_ARCHS)}" \
		$(RUN)/python -m tests.compatibility --quick \
		--torch $(WHEEL_TORCH) --manylinux dist --record $@

wheel-arm: $(VENV)/.installed-wheel  ## the same for AArch64: compiled here, imported in an emulator
	$(RUN)/python -m tests.arm.wheel

test-devices: $(VENV)/.installed  ## exported networks in the real runtimes, each in an environment of its own; DEVICES="openvino ncnn" for some
	$(RUN)/python -m tests.devices.environments $(DEVICES)

test-callbacks: $(VENV)/.installed-callbacks  ## the search in the real Lightning and the real Trainer of Hugging Face
	$(PYTEST) tests/search/test_lightning.py tests/search/test_transformers.py $(call REPORT,$@)

test-threads: $(VENV)/.installed  ## the CPU kernels under ThreadSanitizer (GCC)
	$(RUN)/python -m tests.threads

test-arm: $(VENV)/.installed  ## the CPU kernels for AArch64, emulated, against each instruction set of this machine
	$(RUN)/python -m tests.arm.build
	METAPOOL_ARM=$(abspath build/arm) $(RUN)/python -m pytest tests/arm $(call REPORT,$@)

test-slow: $(VENV)/.installed  ## what repeats the tests for other architectures and larger searches
	$(PYTEST) tests -m slow $(call REPORT,$@)

test-large: $(VENV)/.installed  ## maps beyond 2**31 elements; takes some 15 GiB
	$(PYTEST) tests -m large $(call REPORT,$@)

fuzz: $(VENV)/.installed  ## 20,000 fresh calls of each backend; hours: FUZZ="--backends cpu --examples 1000"
	$(RUN)/python -m tests.fuzz $(FUZZ)

mutate: $(VENV)/.installed  ## faults planted one at a time: do the tests notice? ONLY=regex for some
	$(RUN)/python -m tests.mutation --only "$(ONLY)"

checked: $(VENV)/.installed  ## tests/README.md from the reports that these commands have left
	$(RUN)/python -m tests.checked

search: $(VENV)/.installed-search  ## the first look: search, adapt, export and evaluate on images of MNIST
	$(RUN)/metapool search $(SEARCH) --overwrite
	$(RUN)/metapool adapt $(SEARCH) --jobs 2
	$(RUN)/metapool export $(SEARCH)
	$(RUN)/metapool evaluate $(SEARCH)

bench: $(VENV)/.installed-bench  ## our op against its peers; QUICK=--quick for under a minute
	$(RUN)/python -m pytest benches --benchmark-only $(QUICK)

bench-import: install  ## what an import takes over torch's own
	$(RUN)/python -m benches.import_time

bench-report: $(VENV)/.installed-bench  ## the full report under benches/results; QUICK=--quick for under 90 s
	$(RUN)/python -m benches.report $(QUICK)

bench-search: $(VENV)/.installed-bench  ## does the search find what is there; QUICK=--quick for one seed
	$(RUN)/python -m benches.search_quality $(QUICK)

# It takes the environment that is there; only its own one has to be complete.
gpu-check: $(if $(filter $(abspath $(RUN)/python),$(abspath $(PYTHON))),$(VENV)/.installed)  ## everything that only a GPU can tell, within ten minutes, into benches/results; DRY=--dry-run without one
	$(PYTHON) -m benches.gpu_check $(DRY) $(GPU_CHECK)

gpu-pack: install  ## what gpu-check would have to build, for sm_90 into build/gpu-pack; PACK="--archs 80" for another
	$(RUN)/python -m benches.gpu_check.pack $(PACK)

gpu-model: install  ## what the machine code of both sets of GPU kernels should reach
	$(RUN)/python -m benches.gpu_model

lint: $(VENV)/.installed-lint  ## ruff, mypy and clang-format
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run --Werror $(CPP_SOURCES) $(TEST_SOURCES)

format: $(VENV)/.installed-lint  ## what lint can mend by itself
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CPP_SOURCES) $(TEST_SOURCES)

install: $(VENV)/.installed-op  ## the op itself, without what the search and the tests need

# A stamp for each group of packages, so that a target waits for no more than it needs. A step that
# fails leaves none.
$(VENV)/.installed-torch:
	@echo "== torch, and what builds the kernels: with CUDA some gigabytes, minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install "torch>=2.10" numpy "setuptools>=77" ninja pybind11
	@touch $@

# torch comes first: the package is built against the very torch that it will run with, instead of
# a second copy in an isolated build environment. pip hides what a build prints, so that setup.py
# runs before it and leaves nothing to compile.
$(VENV)/.installed-op: $(VENV)/.installed-torch pyproject.toml setup.py $(CPP_SOURCES)
	@echo "== the kernels, for each instruction set: minutes; for CUDA more, where there is a GPU"
	$(RUN)/python setup.py --quiet build_ext --inplace
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

# One after the other, since two pips would be in each other's way; the linters share nothing with
# the tests. mypy reads what the search imports. The package is there, so pip installs extras alone.
$(VENV)/.installed-search: EXTRAS = search,export
$(VENV)/.installed-search: $(VENV)/.installed-op
$(VENV)/.installed: EXTRAS = test
$(VENV)/.installed: $(VENV)/.installed-search
$(VENV)/.installed-bench: EXTRAS = bench
$(VENV)/.installed-bench: $(VENV)/.installed
$(VENV)/.installed-wheel: EXTRAS = wheel
$(VENV)/.installed-wheel: $(VENV)/.installed-op
$(VENV)/.installed-lint: EXTRAS = lint
$(VENV)/.installed-lint: $(VENV)/.installed-search
$(VENV)/.installed-callbacks: EXTRAS = lightning,transformers
$(VENV)/.installed-callbacks: $(VENV)/.installed
$(addprefix $(VENV)/.installed,-search -bench -wheel -lint -callbacks) $(VENV)/.installed:
	@echo "== the packages of [$(EXTRAS)]: minutes, if they are many"
	$(RUN)/python -m pip install --quiet "metapool_kernels[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info metapool_kernels/*.so metapool_kernels/_build.json
