# Everything a person runs by hand. `make` alone lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OSP := $(BIN)/osp
OUT ?= outputs
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: setup demo test lint train-vae eval bench-vae bench-denoiser sweep clean help

setup: $(INSTALLED)  ## make .venv with everything, versions as in constraints.txt

# torch first: the others then take the build of it that is there (constraints.txt says which).
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## shards, a trained tiny VAE, an evaluation: outputs/demo, in under 10 minutes on 4 cores
	$(OSP) shards output=$(OUT)/demo/shards/train synthetic.clips=1024 synthetic.frames=33 synthetic.seed=0
	$(OSP) shards output=$(OUT)/demo/shards/heldout synthetic.clips=32 synthetic.frames=33 synthetic.seed=1
	$(OSP) train experiment=wfvae_tiny output=$(OUT)/demo/train data=shards data.val.frames=33 \
		data.train.path=$(OUT)/demo/shards/train data.val.path=$(OUT)/demo/shards/heldout
	$(OSP) eval checkpoint=$(OUT)/demo/train/checkpoints/best.ckpt input=$(OUT)/demo/shards/heldout output=$(OUT)/demo \
		clip.frames=33 perceptual.download=false
	@echo
	@echo "input and reconstruction side by side  $(OUT)/demo/reconstructions/"
	@echo "contact sheet                          $(OUT)/demo/contact_sheet.png"
	@echo "numbers                                $(OUT)/demo/metrics.json, metrics.csv"
	@echo "TensorBoard log                        $(BIN)/tensorboard --logdir $(OUT)/demo/train"

test: lint  ## every check: lint, types, import contract, tests, notebooks
	$(BIN)/pytest

lint: setup  ## ruff, mypy, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

train-vae: setup  ## train a VAE: make train-vae ARGS="experiment=wfvae_v13_8ch data.train.path=DIR"
	$(OSP) train $(or $(ARGS),experiment=wfvae_tiny)

eval: setup  ## evaluate one: make eval ARGS="checkpoint=FILE input=DIR"
	$(OSP) eval $(ARGS)

# Variables, because make takes a comma inside $(or ...) for the end of what it chooses from.
VAE_CLIPS := frames=[17,33] sizes=[128x128,256x256]
bench-vae: setup  ## time and memory of the full-size VAE, a quarter of an hour on 4 cores: make bench-vae ARGS="frames=65"
	$(OSP) bench target=vae output=$(OUT)/bench/vae $(or $(ARGS),$(VAE_CLIPS))

# v1.3, a third as wide and a quarter as deep
DENOISER := denoiser=opensora_v13 denoiser.heads=8 \
	'denoiser.stages=[{blocks: 1}, {blocks: 6, pattern: skiparse, k: 4}, {blocks: 1}]' latents=[4x64x64,8x64x64] repeats=2
bench-denoiser: setup  ## sparse beside dense attention, five minutes on 4 cores: make bench-denoiser ARGS="denoiser=joint_tiny"
	$(OSP) bench target=denoiser output=$(OUT)/bench/denoiser $(or $(ARGS),$(DENOISER))

sweep: setup  ## a multirun over two latent sizes, compared in one table
	$(OSP) train --multirun experiment=wfvae_tiny output=$(OUT)/sweep vae.latent_channels=4,16 \
		trainer.max_steps=200 trainer.val_check_interval=100

clean:  ## remove what was made here, but not .venv
	rm -rf outputs multirun .mypy_cache .pytest_cache .ruff_cache .hypothesis

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
