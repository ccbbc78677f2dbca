# Every target sets up what it needs. Variables: PYTHON, PROVIDER=cpu|cuda, PORT, TORCH, RUN, CONFIG, NAME, VERSION.
PYTHON ?= python3
PORT ?= 3000
HOST ?= 127.0.0.1
PROVIDER ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH ?= torch==2.13.0
CONFIG ?= training/configs/pbmc.yaml
RUN ?= runs/pbmc
VERSION ?=
UV := .uv/bin/uv
DEV := .venv
BENCH := .venv-bench
CELLTYPIST := .venv-celltypist
SERVERS := .venv-servers
SERVE := $(if $(filter cuda,$(PROVIDER)),.venv-serve-cuda,.venv-serve)
SERVE_LOCK := requirements/$(if $(filter cuda,$(PROVIDER)),serving-gpu,serving).txt
PACKAGES := service training
export BENTOML_HOME ?= $(CURDIR)/.cache/bentoml
export BENTOML_DO_NOT_TRACK := true
export CELLSERVE_PROVIDER ?= $(PROVIDER)
export UV_CUSTOM_COMPILE_COMMAND := make lock
COMPILE := $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-package torch pyproject.toml

# Images. With podman: BUILDER=podman ENGINE=podman. Where no registry can be reached: BASE_IMAGE=an image at hand.
BASE_IMAGE ?=
BUILDER ?= docker
ENGINE ?= docker
ENGINE_OPTIONS ?=
BUILD_OPTIONS ?=
BENTOML_OPTIONS ?=
RUN_OPTIONS ?=
REVISION := $(shell git describe --always --dirty --tags)
IMAGE ?= cellserve:$(REVISION)
BENTO = $(BENTOML_HOME)/bentos/cellserve/$(REVISION)
# Podman and buildah write health checks in Docker's format only.
BUILD_IMAGE = $(BUILDER) build $(if $(filter podman buildah,$(BUILDER)),--format docker) -f $(BENTO)/src/deploy/Containerfile \
  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --build-arg VERSION=$(REVISION) $(LABELS) $(BUILD_OPTIONS)
LABELS = $(foreach label,title=cellserve licenses=Apache-2.0 version=$(PROJECT_VERSION) revision=$(shell git rev-parse HEAD),\
  --label org.opencontainers.image.$(label)) --label cellserve.models="$(MODELS)"
PROJECT_VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
MODELS = $(shell ls -d models_store/*/*/ | awk -F/ '{printf "%s%s@%s", sep, $$2, $$3; sep=","}')
FINISH_IMAGE = mkdir -p dist && id=$$($(ENGINE) create $(1)) && $(ENGINE) cp $$id:/opt/cellserve/sbom.cdx.json dist/$(2).cdx.json \
  && $(ENGINE) rm $$id >/dev/null && $(ENGINE) history --format '{{.Size}}  {{.CreatedBy}}' $(1)
TEST_IMAGE = CELLSERVE_TEST_IMAGE=$(IMAGE) CELLSERVE_TEST_ENGINE="$(ENGINE) $(ENGINE_OPTIONS)" \
  CELLSERVE_TEST_RUN_OPTIONS="$(SAFE_OPTIONS) $(RUN_OPTIONS)"
SAFE_OPTIONS = --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges

.PHONY: help setup setup-serve serve train calibrate evaluate export reproduce test lint bench bento image image-gpu image-bentoml run-image test-image \
  bench-image bench-stages bench-servers bench-variants bench-cold-start bench-overload bench-stream bench-training bench-quality bench-annotation bench-concurrent \
  bench-out-of-core bench-families bench-reproducibility bench-swaps docs examples lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(DEV)/.ready  ## the environment for training, tests and docs (with torch)

setup-serve: $(SERVE)/.ready  ## the environment for serving (without torch)

serve: $(SERVE)/.ready  ## serve models_store/ on HOST:PORT, with the CUDA build where nvidia-smi answers
	$(SERVE)/bin/bentoml serve service.app:CellServe --host $(HOST) --port $(PORT)

train: $(DEV)/.ready  ## fit CONFIG from the published counts into RUN
	$(DEV)/bin/python -m training fit $(CONFIG) --output $(RUN)

calibrate: $(DEV)/.ready  ## fit probabilities, prediction sets and unknown cells of RUN on cells that it was not trained on
	$(DEV)/bin/python -m training calibrate $(RUN)

evaluate: $(DEV)/.ready  ## all figures of RUN: annotation, likelihood, clusters, batches (docs/evaluate.md)
	$(DEV)/bin/python -m training evaluate $(RUN)
	$(if $(filter runs/pbmc,$(RUN)),cp $(RUN)/evaluation.json docs/)

export: $(DEV)/.ready  ## write RUN as a new version into models_store/
	$(DEV)/bin/python -m training export $(RUN) $(if $(VERSION),--version $(VERSION))

reproduce: $(DEV)/.ready  ## train CONFIG again and compare its graphs, byte by byte, with those of models_store/
	$(DEV)/bin/python -m training reproduce $(CONFIG)

test: $(DEV)/.ready $(SERVE)/.ready $(BENCH)/.ready  ## all tests; servers run without torch, and scvi-tools in an environment of its own
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m pytest

lint: $(DEV)/.ready  ## ruff, mypy in strict mode, the architecture's contracts, generated files
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/python -m docs.generate --check

bench: $(DEV)/.ready $(SERVE)/.ready $(BENCH)/.ready  ## benchmarks/, both sides in one run, as ratios
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python \
	  $(DEV)/bin/python -m benchmarks.embed_http

bench-training: $(DEV)/.ready $(BENCH)/.ready  ## cells per second of a training epoch beside scvi-tools (BENCH_DEVICE=cuda on a GPU)
	CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python $(DEV)/bin/python -m benchmarks.training_speed --precisions 32-true bf16-mixed --device $(or $(BENCH_DEVICE),cpu) \
	  --output benchmarks/training_speed$(if $(filter cuda,$(BENCH_DEVICE)),_cuda).json

bench-quality: $(DEV)/.ready $(BENCH)/.ready  ## accuracy and integration beside scvi-tools and plain baselines, three seeds
	CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python $(DEV)/bin/python -m benchmarks.quality

bench-annotation: $(DEV)/.ready $(SERVE)/.ready $(BENCH)/.ready $(CELLTYPIST)/.ready  ## annotate beside baselines, CellTypist and SCANVI, three seeds
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python CELLSERVE_CELLTYPIST_PYTHON=$(CELLTYPIST)/bin/python \
	  $(DEV)/bin/python -m benchmarks.annotation

bench-concurrent: $(DEV)/.ready $(SERVE)/.ready $(CELLTYPIST)/.ready  ## eight clients with different genes at once: same answers as alone? CellTypist beside
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python CELLSERVE_CELLTYPIST_PYTHON=$(CELLTYPIST)/bin/python $(DEV)/bin/python -m benchmarks.concurrent_clients

bench-out-of-core: $(DEV)/.ready  ## an epoch on a zarr of a million cells: seconds and peak memory
	$(DEV)/bin/python -m benchmarks.out_of_core

bench-families: $(DEV)/.ready $(SERVE)/.ready  ## every family: trained, killed and resumed, exported, compared, served, repeated
	$(DEV)/bin/python -m benchmarks.families

bench-reproducibility: $(DEV)/.ready  ## how far runs lie apart as shipped, with other seeds, with other threads
	$(DEV)/bin/python -m benchmarks.reproducibility

bento: $(SERVE)/.ready  ## build a bento of the service and the models
	rm -rf "$(BENTO)" && mkdir -p .cache
	awk '{print} /^docker:/ && "$(BASE_IMAGE)" {print "  base_image: $(BASE_IMAGE)"}' bentofile.yaml > .cache/bentofile.yaml
	PATH="$(CURDIR)/.uv/bin:$$PATH" $(SERVE)/bin/bentoml build -f .cache/bentofile.yaml --version $(REVISION) .

image: bento  ## build the slim image (IMAGE) from the bento, and its list of parts (dist/)
	$(BUILD_IMAGE) --build-arg REQUIREMENTS=serving.txt -t $(IMAGE) $(BENTO)
	$(call FINISH_IMAGE,$(IMAGE),cellserve)

image-gpu: bento  ## the same with ONNX Runtime for CUDA (IMAGE-gpu)
	$(BUILD_IMAGE) --build-arg REQUIREMENTS=serving-gpu.txt --build-arg PROVIDER=cuda -t $(IMAGE)-gpu $(BENTO)
	$(call FINISH_IMAGE,$(IMAGE)-gpu,cellserve-gpu)

image-bentoml: bento  ## the image as BentoML's own template makes it (IMAGE-bentoml)
	$(SERVE)/bin/bentoml containerize cellserve:$(REVISION) --backend $(BUILDER) -t $(IMAGE)-bentoml $(BENTOML_OPTIONS)

run-image:  ## run IMAGE on PORT: read-only, no capabilities
	$(ENGINE) $(ENGINE_OPTIONS) run --rm $(SAFE_OPTIONS) -p $(HOST):$(PORT):3000 $(RUN_OPTIONS) $(IMAGE)

test-image: $(DEV)/.ready  ## start IMAGE and prove it: safe options, same bits, SIGTERM, a mounted model
	$(TEST_IMAGE) $(DEV)/bin/python -m pytest tests/container -v

bench-servers: $(DEV)/.ready $(SERVE)/.ready $(SERVERS)/.ready $(BENCH)/.ready  ## embedding beside Triton, MLServer, plain BentoML and scvi-tools
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python $(DEV)/bin/python -m benchmarks.embed_servers --provider $(or $(BENCH_DEVICE),cpu)

bench-variants: $(DEV)/.ready $(SERVE)/.ready $(BENCH)/.ready  ## embedding in 8 bits, and with the answer cache, beside neither
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python CELLSERVE_BENCH_PYTHON=$(BENCH)/bin/python $(DEV)/bin/python -m benchmarks.variants

bench-cold-start: $(DEV)/.ready $(SERVE)/.ready $(SERVERS)/.ready  ## from start to ready and first answer, and memory, beside the same servers
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m benchmarks.cold_start

bench-overload: $(DEV)/.ready $(SERVE)/.ready  ## ten times capacity for two minutes, in requests of two sizes: goodput, refusals, memory
	-CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m benchmarks.overload
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m benchmarks.overload --cells 8192 --output benchmarks/overload_large.json

bench-stream: $(DEV)/.ready $(SERVE)/.ready  ## a million cells through one request: memory at both ends
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m benchmarks.million_cells

bench-stages: $(DEV)/.ready  ## where a request's time goes, beside each stage's floor
	$(DEV)/bin/python -m benchmarks.stages

bench-swaps: $(DEV)/.ready $(SERVE)/.ready  ## 200 exchanges of a version under load: failures, latency, memory
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m benchmarks.swaps

bench-image: $(DEV)/.ready image image-bentoml  ## size, layers and start of IMAGE beside BentoML's own image of the same bento
	$(TEST_IMAGE) $(DEV)/bin/python -m benchmarks.image $(IMAGE) $(IMAGE)-bentoml

docs: $(DEV)/.ready  ## write the generated parts and build site/
	$(DEV)/bin/python -m docs.generate
	$(DEV)/bin/mkdocs build --strict

examples: $(DEV)/.ready $(SERVE)/.ready  ## ask a running server for the real answers that the README shows
	CELLSERVE_TEST_SERVER_PYTHON=$(SERVE)/bin/python $(DEV)/bin/python -m docs.examples

lock: $(UV)  ## resolve requirements/ again
	$(COMPILE) -o requirements/serving.txt
	$(COMPILE) --extra gpu --no-emit-package onnxruntime --override requirements/override-gpu.txt -o requirements/serving-gpu.txt
	$(COMPILE) --extra client -c requirements/serving.txt --no-emit-package onnxruntime -o requirements/client.txt
	$(COMPILE) --extra train -c requirements/client.txt -o requirements/training.txt
	$(COMPILE) --extra train --extra dev -c requirements/training.txt -o requirements/development.txt
	$(COMPILE) --extra bench -o requirements/benchmark.txt
	$(COMPILE) --extra servers -o requirements/servers.txt
	$(COMPILE) --extra celltypist -o requirements/celltypist.txt

clean:  ## remove environments, caches and runs
	rm -rf .venv .venv-* .uv .cache runs site dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

$(UV):
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install -q --disable-pip-version-check uv==0.13.8

# Byte code is written once and here: without it a start takes twice as long, every time where PYTHONDONTWRITEBYTECODE is set.
$(SERVERS)/.ready: requirements/servers.txt
$(CELLTYPIST)/.ready: requirements/celltypist.txt
$(SERVERS)/.ready $(CELLTYPIST)/.ready: | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(@D)
	$(UV) pip sync -q --compile-bytecode --require-hashes --python $(@D) $(filter requirements/%,$^)
	touch $@

# What the server needs is SERVE_LOCK alone; the client and the command line come with it because people try both here.
$(SERVE)/.ready: $(SERVE_LOCK) requirements/client.txt pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(@D)
	$(UV) pip sync -q --compile-bytecode --require-hashes --python $(@D) $(SERVE_LOCK) requirements/client.txt
	$(UV) pip install -q --no-deps --python $(@D) -e .
	touch $@

# Environments with torch: it is not locked, and comes last because a sync would take it away again.
$(DEV)/.ready: requirements/development.txt
$(BENCH)/.ready: requirements/benchmark.txt
$(DEV)/.ready $(BENCH)/.ready: pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(@D)
	$(UV) pip sync -q --compile-bytecode --require-hashes --python $(@D) $(filter requirements/%,$^)
	$(UV) pip install -q --no-deps --python $(@D) -e .
	$(UV) pip install -q --no-config --compile-bytecode --python $(@D) "$(TORCH)" $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"}
	touch $@
