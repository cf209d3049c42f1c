# Every target works in a clean clone: it makes its own environment in $(VENV) first.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
CPP_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp python_bindings/*.cpp)
DIGITS := --config configs/digits.yaml

.PHONY: test search bench bench-quick lint format install clean

test: install  ## the whole test suite
	METAPOOL_REQUIRE_NATIVE=1 $(RUN)/python -m pytest tests

search: install  ## search, adapt and evaluate on scikit-learn's digits
	$(RUN)/metapool search $(DIGITS) --overwrite
	$(RUN)/metapool adapt $(DIGITS)
	$(RUN)/metapool evaluate $(DIGITS)

bench: install  ## our op against its peers; QUICK=--quick for under a minute
	$(RUN)/python -m pytest benches --benchmark-only $(QUICK)

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
