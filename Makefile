# Every target sets up what it needs in .venv; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env demo test check bench lint clean

env: $(VENV)/.built

$(VENV)/.deps: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: env
	$(BIN)/python -m dfn.demo $(if $(TEXT),--text $(TEXT))

# Native and reference backends first, then the Triton kernels in their interpreter (it must be on before the import).
test: env
	$(BIN)/python -m pytest -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" -k "triton"

check: test
	$(BIN)/python -m pytest -m slow
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow -k "triton"

bench: env
	$(BIN)/python -m bench

lint: env
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info dfn_kernels/*.so
