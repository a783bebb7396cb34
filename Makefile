# `make quickstart` and `make test` do all the set-up themselves: .venv, from pyproject.toml and constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
LOWEST := .venv-lowest/bin/uv pip install --quiet --compile-bytecode --python .venv-lowest/bin/python

.PHONY: quickstart test test-all test-isa test-lowest lint bench

# One thread trains faster than two: the operations on batches of 8x8 images are too small to share.
quickstart: .venv/quickstart
	$(BIN)/edmdistill convert edmdistill/assets/digits-teacher.pkl $(RUN)/teacher
	OMP_NUM_THREADS=1 $(BIN)/edmdistill train cosim $(RUN)/teacher --data digits --recipe cosim/digits-quickstart --run-dir $(RUN)/cosim
	$(BIN)/edmdistill sample $(RUN)/cosim --nfe 2 --seeds 0-63 --out $(RUN)/cosim/images
	@$(MAKE) --no-print-directory $(RUN)/cosim/eval/teacher.json $(RUN)/cosim/eval/generator.json
	$(BIN)/edmdistill report $(RUN)/cosim --out $(RUN)/report.html

# For `make -n`, which looks for what the commands above would have written.
$(RUN)/teacher/config.json $(RUN)/cosim/generator/config.json: ;

# What is measured is kept as long as its checkpoint stays; the other commands know by themselves what is done.
$(RUN)/cosim/eval/teacher.json: $(RUN)/teacher/config.json
	$(BIN)/edmdistill eval $(RUN)/teacher --solver dpm-solver++2m --nfe 4,7,12 --protocol digits --out $@

$(RUN)/cosim/eval/generator.json: $(RUN)/cosim/generator/config.json
	$(BIN)/edmdistill eval $(RUN)/cosim --nfe 1,2,4 --protocol digits --out $@

# Bytecode is kept, also where the environment says otherwise: hundreds of processes would compile the same modules.
test test-all test-isa test-lowest: export PYTHONDONTWRITEBYTECODE =

# A file's tests go to one of two workers, which makes what they share once; the large files are not the last.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
ROUNDED := $(patsubst %,tests/networks/test_%.py,edm2 golden guidance logvar tangent) tests/networks/surgery/test_two_time.py \
	tests/test_trigflow.py tests/sampling/test_golden.py \
	tests/checkpoints/test_store.py tests/export/test_bundle.py tests/export/test_export.py \
	-k "not slow and not compiled and not traced and not processes and not onnx and not torch_export and not pipeline"

test: .venv/tools
	$(BIN)/python -m pytest $(SHARED) -m "not slow and not gpu"

test-all: .venv/tools
	$(BIN)/python -m pytest $(SHARED)

# What compares two computations of the same numbers, by the vector units of older processors: other units, other rounding.
test-isa: .venv/tools
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest $(SHARED) $(ROUNDED)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(SHARED) $(ROUNDED)

# With the oldest versions that pyproject.toml allows, to which uv can resolve, and today's tools.
test-lowest: .venv-lowest/tools
	.venv-lowest/bin/python -m pytest $(SHARED) -m "not slow and not gpu"

# Speed, traffic and memory as tables; PEERS="--fastgen DIR --edm2 DIR --edm DIR --sid DIR" compares with clones of those.
bench: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(PEERS)

lint: .venv/tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/quickstart: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "Making the environment in .venv: some minutes at most, for torch is large."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[quickstart]'
	@touch $@

.venv-lowest/tools: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install -qq uv
	$(LOWEST) --resolution lowest-direct --editable '.[diffusers,latent,lowbit,onnx,parquet,plot,quickstart,tb]'
	$(LOWEST) --editable '.[dev]'
	@touch $@

# The tools of the tests and the linters on top.
.venv/tools: .venv/quickstart
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@
