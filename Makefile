# Every target does all the set-up it needs on a fresh machine (Python 3.11 or 3.12).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

STORE ?= local
ROOT ?= $(if $(filter s3,$(STORE)),s3://itpn/demo,runs/demo)
S3_DIR ?= runs/s3
SET ?=
DOWNSTREAM = --root "$(if $(filter file default,$(origin ROOT)),,$(ROOT))" --data "$(if $(DATA),$(DATA),$(IMAGENET))" \
  $(if $(CLASSES),--classes "$(CLASSES)") $(if $(EMA),--ema)
FLAGS = $(foreach value,$(SET),--set '$(value)')

export RAY_USAGE_STATS_ENABLED := 0
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-slow check format bench lock pretrain-tiny pretrain-small pretrain-base pretrain-large finetune evaluate store-stop clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## make .venv and install everything from requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}; make PYTHON=/path/to/python3.11")'
	@# A killed set-up leaves half an environment, which is made anew.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# torch first and pinned: any other order lets a dependency choose another build of several GB.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## the whole chain on bundled images (ROOT=…, STORE=s3 for a real S3 server)
ifeq ($(STORE),s3)
	@$(BIN)/python -m cluster.devstore start --dir $(S3_DIR)
	@trap '$(BIN)/python -m cluster.devstore stop --dir $(S3_DIR)' EXIT; \
	source $(S3_DIR)/env; $(BIN)/itpn run demo --root $(ROOT) $(FLAGS)
else
	@$(BIN)/itpn run demo --root $(ROOT) $(FLAGS)
endif

test: $(READY) ## the default test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY) ## the tests marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(READY) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## every benchmark (QUICK=1 for a minute each)
	@for script in $$(grep -l '^if __name__' bench/*.py); do echo "== $$script"; $(BIN)/python $$script $(if $(QUICK),--quick); done

pretrain-tiny pretrain-small pretrain-base pretrain-large: pretrain-%: $(READY) ## pre-train at scale: IMAGENET=URI TEACHER=URI ROOT=URI [SET="a.b=c …"]
	@$(BIN)/itpn run pretrain_$* --root "$(if $(filter file default,$(origin ROOT)),,$(ROOT))" \
	  $(if $(IMAGENET),--set data.source=$(IMAGENET)) $(if $(TEACHER),--set pretrain.teacher.uri=$(TEACHER)) $(FLAGS)

finetune: $(READY) ## fine-tune and evaluate: CHECKPOINT=file, alias, step or sha256, ROOT=URI [DATA=URI or IMAGENET=URI, CLASSES=FILE, EMA=1, SET="a.b=c …"]
	@$(BIN)/itpn finetune "$(CHECKPOINT)" $(DOWNSTREAM) $(if $(RECIPE),--recipe $(RECIPE)) $(FLAGS)

evaluate: $(READY) ## every measurement of a checkpoint: CHECKPOINT=…, ROOT=URI [DATA=URI or IMAGENET=URI, CLASSES=FILE, EMA=1, SET="a.b=c …"]
	@$(BIN)/itpn evaluate "$(CHECKPOINT)" $(DOWNSTREAM) $(FLAGS)

lock: ## pin what is installed in .venv now
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/^torch==\([0-9.]*\)+.*/torch==\1/' | grep -v '^-e ' > requirements.lock

store-stop: ## stop the S3 server of `make demo STORE=s3` after a kill
	@$(BIN)/python -m cluster.devstore stop --dir $(S3_DIR)

clean: ## remove the demo's outputs
	@if test -d $(S3_DIR) && test -x $(BIN)/python; then $(BIN)/python -m cluster.devstore stop --dir $(S3_DIR); fi
	rm -rf runs
