# Two commands do everything: `make demo` shows what Plait does, `make test` proves it. Each installs what it needs into
# .venv, once, again when pyproject.toml, constraints.txt or this file change.
#
#   PYTHON=python3.12 make test       chooses the interpreter (3.11 or newer; otherwise the first one found)
#   PLAIT_TORCH=system make demo      uses the torch that this interpreter has, such as a CUDA build
#   make test ARGS="tests/ops -k norm"

.DEFAULT_GOAL := help
.PHONY: help demo test check clean install native

ARGS ?=
PYTHON ?=
PLAIT_TORCH ?= pinned
BIN := .venv/bin
RUN := $(BIN)/python -m
STAMP := .venv/installed-$(PLAIT_TORCH)
# a library of yesterday's kernels must not meet today's Python
NATIVE := $(wildcard src/plait/kernels/native/*.cpp src/plait/kernels/native/*.h)
# an activated .venv must not be the interpreter that makes .venv anew
export PATH := $(subst $(CURDIR)/$(BIN):,,$(PATH))

help:
	@echo "make demo    the whole story: train, compare, generate, export, report"
	@echo "make test    the tests"
	@echo "make native  compile the C++ kernels again"
	@echo "make check   format, lint, types, rules of the house"
	@echo "make clean   remove .venv and caches"

demo: $(STAMP)
	$(RUN) plait demo $(ARGS)

test: $(STAMP)
	$(RUN) pytest $(ARGS)

check: $(STAMP)
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) pyright
	$(RUN) pytest -q tests/test_house.py

install: $(STAMP)

# the C++ kernels again, after a change
native:
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build src/*.egg-info src/plait/kernels/native/*.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# the first interpreter that is new enough
define FIND_PYTHON
for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python); do \
  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; \
done; \
if [ -z "$$python" ]; then \
  echo "plait needs Python 3.11 or newer$(if $(PYTHON),$(comma) and PYTHON=$(PYTHON) is not,; none is on PATH). Install one, or say PYTHON=/path/to/python" >&2; \
  exit 2; \
fi
endef
comma := ,

# a venv made for the other kind of torch cannot be mended, only made anew. Some systems ship venv without ensurepip:
# there their own pip installs pip
$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(NATIVE)
	@case "$(PLAIT_TORCH)" in pinned|system) ;; \
	  *) echo "PLAIT_TORCH=$(PLAIT_TORCH): say pinned (the tested CPU build) or system (the one installed)" >&2; exit 2;; esac
	@set -e; $(FIND_PYTHON); \
	for stamp in .venv/installed-*; do \
	  if [ -e "$$stamp" ] && [ "$$stamp" != "$(STAMP)" ]; then rm -rf .venv; fi; \
	done; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  rm -rf .venv; echo "making .venv with $$($$python --version)"; \
	  $$python -m venv $(if $(filter system,$(PLAIT_TORCH)),--system-site-packages) .venv >/dev/null 2>&1 || { \
	    rm -rf .venv; \
	    $$python -m venv --without-pip $(if $(filter system,$(PLAIT_TORCH)),--system-site-packages) .venv; \
	    $$python -m pip --python $(BIN)/python install -q --ignore-installed pip; }; \
	fi; \
	$(INSTALL_$(PLAIT_TORCH))
	@$(BIN)/python -m pip install -q -c .venv/constraints.txt -e '.[dev,train,compress,serve]'
	@touch $@

# torch first and by itself, so that no other package's wish can choose its build
define INSTALL_pinned
echo "installing the tested versions (a minute or so)"; \
cp constraints.txt .venv/constraints.txt; \
$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
endef

# tools that the system has need no script in .venv/bin, hence `python -m` above.
# a venv made from a venv sees only the outermost site-packages: a .pth line lends it the ones where torch lies
define INSTALL_system
where=$$($$python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])') || { \
  echo "PLAIT_TORCH=system, but $$python has no torch: install one there, or choose another with PYTHON=..." >&2; \
  rm -rf .venv; exit 2; }; \
$(BIN)/python -c 'import torch' 2>/dev/null || \
  echo "$$where" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system-torch.pth"; \
grep -v '^torch==' constraints.txt > .venv/constraints.txt; \
echo "installing the tested versions around torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"
endef
