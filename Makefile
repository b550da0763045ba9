# `make` lists the targets. They run in .venv, which `make` creates, and updates when its inputs change. An environment
# that it did not create is used as it is: a .venv of yours, or with RUN=python the active one (docs/installing.md).

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DEMO ?= demo
BACKBONE ?= $(DEMO)/backbone
STREETS ?= 80

unexport PYTHONDONTWRITEBYTECODE # otherwise every process recompiles the pipeline's modules

RUN = .venv/bin/python
MARK = .venv/.installed# in every environment that `make` creates; newer than its inputs once all are installed
# the mark, or nothing where the environment is not ours to change
VENV := $(shell [ "$(RUN)" = .venv/bin/python ] && [ ! -L .venv ] && { [ ! -e .venv ] || [ -e $(MARK) ]; } && echo $(MARK))
PIP_INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# The demo's cells are as large as the distance between its streets, so that whole streets are held out, and its
# test split large enough (20 cells or more) for intervals. Its model and its training are small.
DEMO_ROOT = $(DEMO)/$(STREETS)-streets
DEMO_RAW = $(DEMO_ROOT)/raw
DEMO_DATA = $(DEMO_ROOT)/data/$(notdir $(BACKBONE))
DEMO_SETTINGS = --set paths.root=$(DEMO_ROOT) --set paths.raw_dir=raw \
    --set embedding_model.name=$(BACKBONE) --set embedding_model.label=$(notdir $(BACKBONE)) \
    --set embedding_model.pooling=$(if $(filter $(DEMO)/backbone,$(BACKBONE)),mean,cls) \
    --set data.split_cell_m=300 --set data.train_ratio=0.55 --set data.val_ratio=0.15 --set data.test_ratio=0.3 \
    --set training_model.output_dim=128 --set training_model.hidden_dim=256 \
    --set training.epochs=10 --set training.steps_per_epoch=20 --set training.warmup_steps=20 \
    --set infrastructure.embedding_batch_size=32

LOCAL_BACKBONE = $(if $(filter $(DEMO)/backbone,$(BACKBONE)),$(DEMO)/backbone/config.json) # built here, unless another one is named

# Streets on which nothing was chosen, enough for 80 cells or more in the test split.
COMPARED_ROOT = $(DEMO)/compared
COMPARED_RAW = $(COMPARED_ROOT)/raw
COMPARED_SETTINGS = $(DEMO_SETTINGS) --set paths.root=$(COMPARED_ROOT) --set training.epochs=40 --set training.patience=40

# The same size, other streets again; one view, since compare_views.py makes all others itself.
VIEWS_ROOT = $(DEMO)/views
VIEWS_RAW = $(VIEWS_ROOT)/raw
VIEWS_SETTINGS = $(COMPARED_SETTINGS) --set paths.root=$(VIEWS_ROOT) --set 'embedding_model.views=[1.0]' --set training.sampler=random

.PHONY: help install demo compare views test unit soak lint style types bench clients docs clean
help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(VENV)  ## create .venv with all dependencies (CONSTRAINTS= for a torch with CUDA)
	@$(if $(VENV),:,echo "$(RUN) is used as it is: make did not create its environment (docs/installing.md)")

$(MARK): pyproject.toml $(CONSTRAINTS)
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 2; }
	@mkdir -p .venv && touch -t 200001010000 $@ # ours, though not installed yet
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) --no-compile -e '.[dev]'
	@$(RUN) -W ignore -m compileall -q -j 0 .venv/lib > /dev/null || true # on all cores; whatever fails is compiled on first use
	@touch $@

demo: $(VENV) $(DEMO_RAW)/.complete $(LOCAL_BACKBONE)  ## the whole chain on synthetic streets, on this machine, in minutes
	@$(RUN) slurm/submit.py --local $(DEMO_SETTINGS)
	@test $(DEMO_DATA)/search.png -nt $(DEMO_DATA)/published/default/provenance.json || $(RUN) publish/demo_usage.py search --out $(DEMO_DATA)/search.png $(DEMO_SETTINGS)
	@echo "search   $(abspath $(DEMO_DATA))/search.png"
	@$(RUN) publish/generate_embeddings_from_parquet.py --remake $(DEMO_SETTINGS)
	@$(RUN) publish/aggregate_buildings.py --remake $(DEMO_SETTINGS)
	@$(RUN) publish/explore.py --remake $(DEMO_SETTINGS)

$(DEMO_RAW)/.complete: $(VENV)
	@$(RUN) tests/synthetic.py --out $(DEMO_RAW) --streets $(STREETS) --cities 4 --processes 2
	@touch $@

$(DEMO)/backbone/config.json: $(VENV)
	@$(RUN) tests/local_backbone.py --out $(DEMO)/backbone

compare: $(VENV) $(COMPARED_RAW)/.complete $(LOCAL_BACKBONE)  ## every sampler with every loss, on other streets; update docs/comparison.md
	@$(RUN) slurm/submit.py --local --to compute_visual_neighbors $(COMPARED_SETTINGS)
	@for shard in 0 1; do \
	    OMP_NUM_THREADS=1 $(RUN) train/compare.py --shard $$shard --num-shards 2 $(COMPARED_SETTINGS) & done; wait
	@$(RUN) train/compare.py $(COMPARED_SETTINGS)
	@cp $(COMPARED_ROOT)/data/$(notdir $(BACKBONE))/evaluation/default/comparison.json tests/benchmarks/
	@$(RUN) tests/generated_docs.py

$(COMPARED_RAW)/.complete: $(VENV)
	@$(RUN) tests/synthetic.py --out $(COMPARED_RAW) --streets 300 --cities 4 --seed 7 --processes 2
	@touch $@

views: $(VENV) $(VIEWS_RAW)/.complete $(LOCAL_BACKBONE)  ## which views of a picture, combined how, on other streets; update docs/comparison.md
	@$(RUN) slurm/submit.py --local --to compute_visual_neighbors $(VIEWS_SETTINGS)
	@$(RUN) tests/benchmarks/compare_views.py --vectors $(VIEWS_SETTINGS)
	@for shard in 0 1; do \
	    OMP_NUM_THREADS=1 $(RUN) tests/benchmarks/compare_views.py --shard $$shard --num-shards 2 $(VIEWS_SETTINGS) & done; wait
	@$(RUN) tests/benchmarks/compare_views.py $(VIEWS_SETTINGS)
	@cp $(VIEWS_ROOT)/data/$(notdir $(BACKBONE))/evaluation/default/views.json tests/benchmarks/
	@$(RUN) tests/generated_docs.py

$(VIEWS_RAW)/.complete: $(VENV)
	@$(RUN) tests/synthetic.py --out $(VIEWS_RAW) --streets 300 --cities 4 --seed 41 --processes 2
	@touch $@

test: style  ## lint and all tests; types are checked while the tests run
	@$(MAKE) --no-print-directory -j2 types unit || { echo "error: see above: types or tests"; exit 1; }

unit: $(VENV)  ## the tests only
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder -q

soak: $(VENV)  ## hundreds of small worlds at random through the stages, about 20 minutes
	WORLDS=1200 $(RUN) -m pytest -n auto --dist worksteal -q tests/test_worlds.py

lint: style types  ## style, imports, formatting and types

style: $(VENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)
	$(RUN) -m mypy

bench: $(VENV)  ## time everything against its baselines; update README.md and docs/benchmarks.md
	$(RUN) tests/benchmarks/run_all.py

clients: $(VENV)  ## a published model in the programs that people use it with, each in an environment of its own
	$(RUN) tests/clients/run_clients.py --place $(DEMO)/clients

docs: $(VENV)  ## update the generated parts of README.md and docs/*.md
	$(RUN) tests/generated_docs.py

clean:  ## remove what the demo and the tests produced
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
