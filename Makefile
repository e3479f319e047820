# What people run by hand. `make` alone lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OSP := $(BIN)/osp
OUT ?= outputs
INSTALLED := $(VENV)/.installed
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: setup demo demo-long study test test-npu lint fuzz train-vae eval bench-vae bench-denoiser sweep clean help

setup: $(INSTALLED)  ## install everything into .venv, in the versions of constraints.txt

# torch first: the others then take the build of it that is there (constraints.txt says which).
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# DEMO_CLIPS are drawn; DEMO_VAE and DEMO_DENOISER are steps; PROMPTS held-out captions are judged. The VAE trains in
# one, two or four processes, as there are cores, since convolutions so small gain little from threads. These share the
# 16 clips of a step, so that it has the same clips on any machine. The denoiser's step is too short to be shared.
DEMO := $(OUT)/demo
PROCESSES := $(if $(filter 1,$(CORES)),1,$(if $(filter 2 3,$(CORES)),2,4))
SHARED := trainer=ddp_cpu trainer.devices=$(PROCESSES) trainer.strategy=ddp data.workers=0 \
	data.batch_size=$(shell expr 16 / $(PROCESSES))
DEMO_CLIPS ?= 3072
DEMO_VAE ?= 800
DEMO_DENOISER ?= 1000
PROMPTS ?= 64

demo: setup  ## go from nothing to videos of sentences, in under 15 minutes on 4 cores: outputs/demo/index.html
	$(OSP) shards output=$(DEMO)/shards/train synthetic=plain synthetic.frames=9 synthetic.clips=$(DEMO_CLIPS) synthetic.seed=0
	$(OSP) shards output=$(DEMO)/shards/heldout synthetic=plain synthetic.frames=9 synthetic.clips=256 synthetic.seed=1
	$(OSP) train experiment=wfvae_tiny output=$(DEMO)/vae data=shards data.val_clips=32 \
		data.train.path=$(DEMO)/shards/train data.val.path=$(DEMO)/shards/heldout \
		trainer.max_steps=$(DEMO_VAE) trainer.val_check_interval=300 $(SHARED)
	$(OSP) eval checkpoint=$(DEMO)/vae/checkpoints/last.ckpt input=$(DEMO)/shards/heldout output=$(DEMO)/reconstruction \
		clip.frames=9 max_clips=64 perceptual.download=false
	$(OSP) cache checkpoint=$(DEMO)/vae/checkpoints/last.ckpt input=$(DEMO)/shards/train output=$(DEMO)/features/train \
		clip.frames=9 batch_size=16 processes=$(PROCESSES)
	$(OSP) cache checkpoint=$(DEMO)/vae/checkpoints/last.ckpt input=$(DEMO)/shards/heldout \
		output=$(DEMO)/features/heldout scaling_from=$(DEMO)/features/train clip.frames=9 batch_size=16
	$(OSP) train experiment=t2v_tiny denoiser=suv_tiny output=$(DEMO)/denoiser data.val_clips=64 \
		data.train.path=$(DEMO)/features/train data.val.path=$(DEMO)/features/heldout \
		trainer.max_steps=$(DEMO_DENOISER)
	$(OSP) sample checkpoint=$(DEMO)/denoiser/checkpoints/last.ckpt prompts=tools/demo_prompts.txt output=$(DEMO)/samples \
		precision=auto batch_size=4
	$(OSP) eval target=generation checkpoint=$(DEMO)/denoiser/checkpoints/last.ckpt input=$(DEMO)/shards/heldout \
		prompts=$(PROMPTS) output=$(DEMO)/generation precision=auto batch_size=16
	$(OSP) page vae_run=$(DEMO)/vae reconstruction=$(DEMO)/reconstruction denoiser_run=$(DEMO)/denoiser \
		generation=$(DEMO)/generation samples=$(DEMO)/samples output=$(DEMO)/index.html
	@echo
	@echo "everything on one page   $(DEMO)/index.html"
	@echo "four sampled prompts     $(DEMO)/samples/"
	@echo "numbers                  $(DEMO)/generation/metrics.json, $(DEMO)/reconstruction/metrics.json"
	@echo "TensorBoard log          $(BIN)/tensorboard --logdir $(DEMO)"

demo-long:  ## the demo with more clips and steps, in under an hour on 4 cores: outputs/demo_long/index.html
	$(MAKE) demo DEMO=$(OUT)/demo_long DEMO_CLIPS=8192 DEMO_VAE=2400 DEMO_DENOISER=4000

study: setup  ## compare sparse and dense attention on the demo's features, in 21 runs: make study ARGS="--seeds 1 --steps 300"
	$(BIN)/python tools/study.py features=$(DEMO)/features/train heldout_features=$(DEMO)/features/heldout \
		heldout=$(DEMO)/shards/heldout output=$(OUT)/study $(ARGS)

# A process of one thread for each core, as most tests are too small to share; at most 8, for each takes 1.5 GB. The
# tests of a file stay in one process, so that what they share is made once.
test: lint  ## run every check: lint, types, import contract, tests, notebooks
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=$(CORES) --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
	$(MAKE) --no-print-directory test-npu

# A session of its own, as the name of the device is the whole process's. Without a compiler all of it is skipped.
test-npu: setup  ## run the tests on a simulated Ascend NPU, which is built first
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=$(CORES) --maxprocesses=2 --dist=loadfile tests/fakenpu

lint: setup  ## run ruff, mypy and the import contract alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: setup  ## damage thousands of files and read them, and flip bits in stored ones: make fuzz ARGS="--seed 7 --only media"
	$(BIN)/python tools/fuzz.py $(or $(ARGS),--count 800)
	$(if $(ARGS),,$(BIN)/python tools/fuzz.py --flips 200)

train-vae: setup  ## train a VAE: make train-vae ARGS="experiment=wfvae_v13_8ch data.train.path=DIR"
	$(OSP) train $(or $(ARGS),experiment=wfvae_tiny)

eval: setup  ## evaluate a VAE or a denoiser: make eval ARGS="checkpoint=FILE input=DIR"
	$(OSP) eval $(ARGS)

# These are variables, because inside $(or ...) make takes a comma for the end of a choice.
VAE_CLIPS := frames=[17,33] sizes=[128x128,256x256]
bench-vae: setup  ## measure time and memory of the full-size VAE, a quarter of an hour on 4 cores: make bench-vae ARGS="frames=65"
	$(OSP) bench target=vae output=$(OUT)/bench/vae $(or $(ARGS),$(VAE_CLIPS))

# v1.3, a third as wide and a quarter as deep
DENOISER := denoiser=opensora_v13 denoiser.heads=8 \
	'denoiser.stages=[{blocks: 1}, {blocks: 6, pattern: skiparse, k: 4}, {blocks: 1}]' latents=[4x64x64,8x64x64] repeats=2
bench-denoiser: setup  ## measure sparse beside dense attention, five minutes on 4 cores: make bench-denoiser ARGS="denoiser=joint_tiny"
	$(OSP) bench target=denoiser output=$(OUT)/bench/denoiser $(or $(ARGS),$(DENOISER))

sweep: setup  ## train two VAEs with other latents, and compare them in one table
	$(OSP) train --multirun experiment=wfvae_tiny output=$(OUT)/sweep vae.latent_channels=4,16 \
		trainer.max_steps=200 trainer.val_check_interval=100

clean:  ## remove runs and caches; .venv and data stay
	rm -rf outputs multirun .mypy_cache .pytest_cache .ruff_cache .hypothesis

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16
