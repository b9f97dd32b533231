# What people type. Everything runs in .venv, which the first target makes (see scripts/install.sh).
#   make demo    the whole job on MovieLens-100K: train, compress to 5 %, serve both, load-test, one table
#   make test    every test, and the slowest ten
#   make coverage  the same, and which lines were run: a quarter longer
#   make bench-serving  what a recommendation costs, every way to serve it: an hour, on a quiet machine
#   make bench-quality DATA_ROOT=DIR  what pruning keeps, against its controls: days on two cores, resumable
#   make screenshots PAGES='FILE ... URL'  pictures of report pages and of a running service's page
#   make lint    ruff, mypy, the Dockerfile and the compose file
# EXTRA=gpu installs vLLM for NVIDIA GPUs instead of the CPU build; PYTHON names the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test coverage lint screenshots bench-serving bench-quality

EXTRA ?= cpu
VENV := .venv
INSTALLED := $(VENV)/.installed-$(EXTRA)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:
	@sed -n '2,9s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

# One stamp an extra; installing one replaces the other, so the other's stamp goes.
$(INSTALLED): pyproject.toml overrides.txt scripts/install.sh
	scripts/install.sh $(EXTRA) $(VENV)
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(INSTALLED)
	python -m benchmarks.demo

# DATA names the folder of another data set, NAME what to call it; without them MovieLens-100K.
bench-serving: $(INSTALLED)
	python -m benchmarks.serving $(if $(DATA),--data $(DATA) --name $(NAME))
	python -m benchmarks.serving.exactness --model runs/serving/$(or $(NAME),ml-100k) --data $(or $(DATA),ml-100k)
	python -m benchmarks.serving.settings --model runs/serving/$(or $(NAME),ml-100k) --data $(or $(DATA),ml-100k)
ifndef DATA
	OMP_NUM_THREADS=1 python -m benchmarks.serving.products
	python -m benchmarks.serving.service
	python -m benchmarks.serving.profile
	python -m benchmarks.serving.pruned
	python -m benchmarks.serving.precision --model runs/serving/ml-100k --data ml-100k
	python -m benchmarks.serving.big_catalog
endif
	python -m benchmarks.serving.page

# DATA_ROOT holds a folder for each data set of benchmarks/quality/sets.py.
bench-quality: $(INSTALLED)
	python -m benchmarks.quality --data-root $(DATA_ROOT)

test: $(INSTALLED)
	# One thread each: two workers fill two cores, and threads that wait for one another by spinning do not.
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=10 $(MEASURED)

coverage: MEASURED := --cov --cov-report=term:skip-covered
coverage: test

# Without PAGES those of the tests, made up.
screenshots: $(INSTALLED)
	LEANREC_SCREENSHOTS=docs/screenshots LEANREC_SCREENSHOT_PAGES='$(PAGES)' pytest -rs tests/browser/test_screenshots.py

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	hadolint Dockerfile
	check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
