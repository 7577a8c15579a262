# Everything a user or developer needs, in its own virtual environment. `make help` lists the commands.
#
# PYTHON  the interpreter to start from; if it can import torch, that torch is used
# TORCH   what to install if it cannot, e.g. TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# VENV    where the environment goes

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CHROMIUM ?= chromium
NVCC ?= $(shell command -v nvcc)
# Processes of make test, up to 4; each takes up to 2 GB.
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
# More options for train.py: about a minute in all, on two idle processors.
DEMO_TRAIN_FLAGS ?= --preset quick --iterations 300 --test_iterations 100 200

RASTERIZER := submodules/diff-gaussian-rasterization
KNN := submodules/simple-knn
DEMO := output/demo
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# For tools, which are in $(VENV), or already installed next to an existing torch.
TOOLS := PATH="$(abspath $(BIN)):$$PATH"
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The sources of a submodule, on which its installed copy depends.
sources_of = $(shell find $(1) \( -name build -o -name '*.egg-info' -o -name __pycache__ \) -prune -o \
  -type f ! -name '*.md' ! -name '*.so' -print)
CSRC := $(wildcard submodules/*/*/csrc submodules/*/*/csrc/*)
CPP_FILES := $(sort $(foreach folder,$(CSRC),$(wildcard $(folder)/*.h $(folder)/*.cpp $(folder)/*.cu)))
CUDA_OBJECTS := $(patsubst submodules/%.cu,build/cuda-check/%.o,$(filter %.cu,$(CPP_FILES)))

# Checks every access and conversion in the CPU kernels; any finding ends the tests.
SANITIZE_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr \
  -fno-sanitize-recover=all
OPERATOR_TESTS := tests/operators_fuzz.py tests/test_folded_rasterizer.py tests/test_general_rasterizer.py tests/test_losses.py

.PHONY: help setup demo test test-browser test-slurm slurm cluster chromium lint format docs bench cuda-check sanitize wheels clean
.DELETE_ON_ERROR:

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- The environment: each stamp is remade when something it depends on is newer -------------------------------------

setup: $(STAMPS)/rasterizer $(STAMPS)/knn $(STAMPS)/requirements  ## install everything in $(VENV) (the others do so too)

# An existing torch is kept. If it is in the virtual environment that PYTHON belongs to, no --system-site-packages
# reaches it: a .pth file then names its folder.
$(STAMPS)/torch:
	@echo "setting up $(VENV)"
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV); \
	  $(BIN)/python -c 'import torch' 2>/dev/null || \
	    $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	      > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) $(TORCH); }
	@$(PIP) setuptools wheel
	@mkdir -p $(@D) && touch $@

$(STAMPS)/requirements: requirements.txt $(STAMPS)/torch
	@echo "installing $<"
	@$(PIP) -r $< && touch $@

$(STAMPS)/requirements-dev: requirements-dev.txt $(STAMPS)/requirements
	@echo "installing $<"
	@$(PIP) -r $< && touch $@

$(STAMPS)/requirements-docs: requirements-docs.txt $(STAMPS)/requirements
	@echo "installing $<"
	@$(PIP) -r $< && touch $@

$(STAMPS)/rasterizer: $(call sources_of,$(RASTERIZER)) $(STAMPS)/torch
	@echo "compiling and installing $(RASTERIZER) (a minute or two the first time)"
	@$(PIP) --no-build-isolation $(RASTERIZER) && touch $@

$(STAMPS)/knn: $(call sources_of,$(KNN)) $(STAMPS)/torch
	@echo "installing $(KNN)"
	@$(PIP) --no-build-isolation $(KNN) && touch $@

# --- Using it ----------------------------------------------------------------------------------------------------------

demo: setup  ## train on every second slice of an MRI volume, with mesh and report: output/demo/report.html
	@volume="$$($(BIN)/python -c 'import nibabel; print(nibabel.__path__[0])')/tests/data/example4d.nii.gz" && set -x && \
	$(BIN)/python demo.py mask --frame 0 -i "$$volume" -o $(DEMO)/mask.nii.gz && \
	$(BIN)/python prepare.py --frame 0 --keep_every 2 --force -i "$$volume" -l $(DEMO)/mask.nii.gz -o $(DEMO)/data && \
	rm -rf $(DEMO)/model && \
	$(BIN)/python train.py -s $(DEMO)/data/img --pipeline joint --seg_source_path $(DEMO)/data/seg -m $(DEMO)/model \
	  --report $(DEMO_TRAIN_FLAGS) && \
	$(BIN)/python render.py -m $(DEMO)/model --interp 2 --pipeline both --nifti && \
	$(BIN)/python slices_to_ply.py -i $(DEMO)/model -o $(DEMO)/mesh --jobs 1 && \
	$(BIN)/python demo.py sheet -m $(DEMO)/model --mesh $(DEMO)/mesh/model.ply -o $(DEMO)/preview.png
	@cp $(DEMO)/model/report.html $(DEMO)/report.html
	@printf '  %s\n' "$(DEMO)/preview.png  what was learned, at a glance" \
	  "$(DEMO)/report.html  the report: open it in a browser, send it" \
	  "$(DEMO)/mesh/model.ply  the mesh: 3D Slicer, MeshLab and Blender open it" \
	  "look around: $(BIN)/python -m pip install starlette uvicorn && $(BIN)/python view.py -m $(DEMO)/model" \
	  "your own volume: $(BIN)/python medgs.py -i volume.nii.gz -o output/case"

bench: setup  ## measure the speed on this machine
	$(BIN)/python -m benchmarks.run

# --- Developing it -----------------------------------------------------------------------------------------------------

test: setup $(STAMPS)/requirements-dev $(if $(NVCC),cuda-check)  ## all tests; compiles the CUDA kernels if there is nvcc
	@$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile

test-browser: setup chromium $(STAMPS)/requirements-dev  ## the viewer and the pages, in Chromium
	@CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest -q --browser -m browser

test-slurm: setup slurm cluster $(STAMPS)/requirements-dev  ## cases as jobs on a local Slurm started for the test; needs root
	@export PATH="$(abspath $(VENV))/cluster/bin:$$PATH"; \
	$(BIN)/python -m pytest -q --slow tests/test_medgs.py -k side_by_side & \
	$(BIN)/python -m pytest -q --slow tests/test_slurm.py; status=$$?; wait $$! && exit $$status

cluster: $(STAMPS)/cluster  ## Snakemake, in its own environment, apart from the programs

$(STAMPS)/cluster: requirements-cluster.txt
	@echo "installing $<"
	@$(PYTHON) -m venv $(VENV)/cluster
	@$(VENV)/cluster/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@mkdir -p $(@D) && touch $@

# Debian packages, installed where that is allowed.
slurm:
	@command -v slurmctld munged > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge \
	    > /dev/null; } || { echo "Slurm is not installed, and could not be" >&2; exit 1; }

# A Debian package, installed where that is allowed.
chromium:
	@command -v $(CHROMIUM) > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; } || \
	  { echo "chromium is not installed, and could not be: apt-get install chromium, or name one with CHROMIUM=..." >&2; \
	    exit 1; }

lint: setup $(STAMPS)/requirements-dev  ## style and types: ruff, clang-format, mypy
	$(TOOLS) ruff check .
	$(TOOLS) ruff format --check .
	$(TOOLS) clang-format --dry-run -Werror $(CPP_FILES)
	$(TOOLS) mypy

format: $(STAMPS)/requirements-dev  ## rewrite the files in the style that lint checks
	$(TOOLS) ruff check --fix --exit-zero --quiet .
	$(TOOLS) ruff format .
	$(TOOLS) clang-format -i $(CPP_FILES)

docs: setup $(STAMPS)/requirements-docs  ## build the documentation in build/docs; a warning is an error
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs build/docs
	@echo "build/docs/index.html"

sanitize: setup $(STAMPS)/requirements-dev  ## the operators' tests on kernels built with sanitizers; needs g++, no GPU
	@echo "compiling the CPU kernels with sanitizers (a minute or two the first time), then testing them"
	@for kernels in "" portable; do \
	  env MEDGS_CXX_FLAGS="$(SANITIZE_FLAGS)" TORCH_EXTENSIONS_DIR="$(CURDIR)/build/sanitize" MEDGS_FORCE_CPU=1 \
	    MEDGS_CPU_KERNELS=$$kernels ASAN_OPTIONS=detect_leaks=0 FUZZ_EXAMPLES=300 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest -q -p no:cacheprovider -W ignore::UserWarning \
	      $$(if [ -z "$$kernels" ]; then echo $(OPERATOR_TESTS); else echo tests/operators_fuzz.py; fi) || exit 1; \
	done

wheels: setup  ## wheels of both packages in dist/, for any torch from 2.10 on: for the CPU and, with nvcc, for CUDA too
	@for kind in cpu $(if $(NVCC),cuda); do \
	  MEDGS_WHEEL=$$kind $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    -w dist $(RASTERIZER) $(KNN) || exit 1; \
	done
	@rm -rf submodules/*/build submodules/*/*.egg-info
	@ls -sh dist

cuda-check: $(if $(NVCC),$(CUDA_OBJECTS),no-nvcc)  ## compile every CUDA kernel; needs nvcc, neither a GPU nor torch

build/cuda-check/%.o: submodules/%.cu $(filter %.h,$(CPP_FILES))
	@mkdir -p $(@D)
	$(NVCC) -c -O3 -std=c++17 -I $(firstword $(subst /cuda/, ,$<)) -gencode arch=compute_75,code=sm_75 \
	  -gencode arch=compute_90,code=sm_90 $< -o $@

.PHONY: no-nvcc
no-nvcc:
	@echo "cuda-check: no nvcc on the PATH: install the CUDA toolkit, or name it with NVCC=..." >&2; exit 1

clean:  ## remove the environment and what was built (output/ stays)
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .hypothesis submodules/*/build submodules/*/*.egg-info
