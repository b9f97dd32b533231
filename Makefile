# What people type. Everything runs in .venv, which the first target makes (see scripts/install.sh).
#   make demo    the whole job on MovieLens-100K: train, compress to 5 %, serve both, load-test, one table
#   make test    every test, with coverage and the slowest ten
#   make lint    ruff, mypy, the Dockerfile and the compose file
# EXTRA=gpu installs vLLM for NVIDIA GPUs instead of the CPU build; PYTHON names the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test lint

EXTRA ?= cpu
VENV := .venv
INSTALLED := $(VENV)/.installed-$(EXTRA)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:
	@sed -n '2,5s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

# One stamp an extra; installing one replaces the other, so the other's stamp goes.
$(INSTALLED): pyproject.toml overrides.txt scripts/install.sh
	scripts/install.sh $(EXTRA) $(VENV)
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(INSTALLED)
	python -m benchmarks.demo

test: $(INSTALLED)
	# One thread each: two workers fill two cores, and threads that wait for one another by spinning do not.
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --durations=10 --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	hadolint Dockerfile
	check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
