# Every command makes its environment in .venv first, and does not install twice.
#
#   make train                          5 snapshots on scikit-learn's digits, about a minute on two CPU cores
#   make train DATASET=cifar100 M=5     the paper's recipe
#   make test                           lint and tests
#   make bench                          all benchmarks and their report, 25 to 40 minutes; DATA holds CIFAR-100
#   make bench-peers                    the libraries that the benchmarks compare with
#   make kernel-report                  the Triton kernels, compiled for three GPUs without one: registers, accesses
#   make gpu-check                      everything that needs a GPU, into one report file
#   make apex                           NVIDIA's apex, from source, for --update apex
#
# Variables of `make train`, each a flag of `python -m fastsnap.train` (unset: the data set's recipe):
#   DATASET  M (cycles)  EPOCHS  NET  BATCH  LR  SEED  DATA (folder of the data sets)  OUT (run folder)  ARGS (further flags)
# and NPROC, the processes (ranks) that torchrun starts on this machine, which share the cores or have a GPU each

.PHONY: help train test lint bench bench-peers kernel-report gpu-check apex clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

PYTHON ?= python3
BIN := .venv/bin

# A variable that no target asked for reads would be ignored without a word.
VARIABLES_train := DATASET M EPOCHS NET BATCH LR SEED DATA OUT NPROC ARGS
VARIABLES_bench := DATA OUT ARGS
VARIABLES_apex := APEX_TAG
TOOLS := PYTHON SHELL MAKE CC CXX CPP CFLAGS CXXFLAGS CPPFLAGS LDFLAGS
MEANT_BATCH_SIZE := BATCH
MEANT_BATCHSIZE := BATCH
MEANT_CYCLES := M
MEANT_SNAPSHOTS := M
MEANT_LEARNING_RATE := LR
MEANT_EPOCH := EPOCHS
MEANT_NETWORK := NET
MEANT_MODEL := NET
MEANT_WORLD_SIZE := NPROC
MEANT_GPUS := NPROC
goals := $(or $(MAKECMDGOALS),help)
given := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
taken := $(foreach goal,$(goals),$(VARIABLES_$(goal)))
refuse = $(error make $(goals) has no variable $(1)$(if $(MEANT_$(1)),: did you mean $(MEANT_$(1))?,.) $(if $(taken),Its variables \
  are $(taken)$(if $(filter ARGS,$(taken)),; other flags go into ARGS='--flag value'),It takes none))
$(foreach name,$(filter-out $(taken) $(TOOLS),$(given)),$(call refuse,$(name)))

flag = $(if $($(1)),$(2) '$($(1))')
TRAIN_FLAGS = $(call flag,DATASET,--dataset) $(call flag,M,--cycles) $(call flag,EPOCHS,--epochs) $(call flag,NET,--net) \
  $(call flag,BATCH,--batch-size) $(call flag,LR,--lr) $(call flag,SEED,--seed) $(call flag,DATA,--data) \
  $(call flag,OUT,--out) $(ARGS)

# OMP_NUM_THREADS=1 is what torchrun sets itself, with a warning; the ranks then take their shares of the cores.
PROCESSES = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node '$(NPROC)' -m

train: .venv/installed
	@$(if $(filter-out 1,$(NPROC)),$(PROCESSES),$(BIN)/python -m) fastsnap.train $(TRAIN_FLAGS)

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks

bench: .venv/installed
	@$(BIN)/python benchmarks/run.py $(call flag,DATA,--data) $(call flag,OUT,--out) $(ARGS)

bench-peers: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'torchensemble>=0.2,<0.3' 'timm>=1,<2'

kernel-report: .venv/installed
	@$(BIN)/python -m fastsnap.kernels.report

gpu-check: .venv/installed
	@$(BIN)/python benchmarks/gpu_check.py

# With its CUDA extensions; PyPI's `apex` is something else. Needs nvcc of torch's CUDA version, and takes a while.
APEX_TAG := 25.09
apex: .venv/installed
	$(BIN)/python -c "import torch.utils.cpp_extension as e, sys; e.CUDA_HOME or sys.exit('make apex needs the CUDA toolkit (nvcc); none was found')"
	APEX_CPP_EXT=1 APEX_CUDA_EXT=1 $(BIN)/pip install -v --no-build-isolation \
	  "git+https://github.com/NVIDIA/apex@$(APEX_TAG)"

# The compiler that building the kernels will call: asked for before gigabytes are downloaded, within the recipe, where
# variables of make's command line are in the environment.
COMPILER := import os, sysconfig; print((os.environ.get('CXX') or sysconfig.get_config_var('CXX') or 'c++').split()[0])

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard kernels/*.cpp kernels/*.h)
	@compiler=$$($(PYTHON) -c "$(COMPILER)") && command -v $$compiler > /dev/null || { \
	  echo "make needs a C++ compiler for the CPU kernels, and $$compiler is missing (Debian: apt install g++)." >&2; \
	  echo "Another one: make CXX=... ; none at all: pip install . works too, but slower." >&2; \
	  exit 1; }
	@echo "installing into .venv; torch and its CUDA libraries are several GB, which takes minutes on a slow connection"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dali,test,bench]'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]' || \
	  echo "without a browser (PySide6-WebEngine) here: the tests of report.html will be skipped"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
