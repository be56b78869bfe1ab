# `make run` shows a picture, `make chat` gives an answer, `make video` makes a video, `make page`
# opens a page to try all three on, `make test` runs the tests, `make quick` those that concern your
# changes, `make test-deep` what takes an hour. Each makes what it needs, once.
# `run`, `chat` and `video` end with the file's place, or with the answer; `VERBOSE=1` prints the
# whole document, and the log.
# `make gpu` tests and measures a machine's GPU in at most nine minutes; `make gpu DEVICE=cpu` tries it.
# `make image FAMILY=sdxl` builds an image, and with `CUDA=12.8` one for hosts with older drivers;
# `make client` makes the TypeScript client as a package of npm.

PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
FAMILIES ?= sdxl
FAMILY ?= sdxl
# 13.0, or 12.8 for hosts with older drivers.
CUDA ?= 13.0
IMAGE = ourvidz-$(FAMILY):dev$(if $(filter 13.0,$(CUDA)),,-cuda$(CUDA))
# Named, since a worker on RunPod does not start without a model's name.
SDXL_MODEL ?= pocket
CHAT_INSTRUCT_MODEL ?= pocket
WAN_MODEL ?= pocket
MODELS = SDXL_MODEL=$(SDXL_MODEL) CHAT_INSTRUCT_MODEL=$(CHAT_INSTRUCT_MODEL) WAN_MODEL=$(WAN_MODEL)
# Of `gpu`: cuda, cuda:1, or cpu to try the command on small networks.
DEVICE ?= cuda
# How many tests run side by side; a file's tests stay together. Some wait for servers, so four fill
# two cores.
PROCESSES ?= 4
# Each process of the tests imports the project's own modules. They are compiled once, not each time.
test quick test-deep: export PYTHONDONTWRITEBYTECODE :=
BY_FILE := --dist loadfile --no-loadscope-reorder

# A family may have a first job of its own; without one, handler.py reads test_input.json.
ifneq ($(wildcard test_input.$(FAMILIES).json),)
INPUT := --test_input "$$(cat test_input.$(FAMILIES).json)"
endif
ifeq ($(findstring chat,$(FAMILIES))$(CHAT_INSTRUCT_MODEL),chatpocket)
WEIGHTS := .cache/pocket_chat/config.json
endif

# Where torch comes from. For Linux PyPI has the build for CUDA alone, with 2.8 GB of libraries that
# a machine without an NVIDIA GPU cannot use. `make run TORCH_INDEX=` takes it all the same.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell test "$$(uname -s)" != Linux || nvidia-smi -L >/dev/null 2>&1 || echo $(CPU_INDEX))
TORCH = $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)

# npm writes this file last.
CLIENT_CHECKS := .cache/npm/node_modules/.package-lock.json

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run chat video page client test quick test-deep check format gpu image proof clean

# With `make -j` two pips would write to one environment.
.NOTPARALLEL:

run: .venv/run $(WEIGHTS)
	FAMILIES=$(FAMILIES) $(MODELS) $(BIN)/python handler.py $(INPUT)

chat:
	@$(MAKE) --no-print-directory run FAMILIES=chat

video:
	@$(MAKE) --no-print-directory run FAMILIES=wan

# The newcomer's own page, with all three families on their pocket models.
page: .venv/run .cache/pocket_chat/config.json
	SERVE=http HOST=127.0.0.1 FAMILIES=sdxl,chat,wan $(MODELS) $(BIN)/python -m ourvidz_serverless serve

# The TypeScript client as a package for Node: .cache/ourvidz-serverless-1.0.0.tgz.
client: $(CLIENT_CHECKS)
	PATH="$(CURDIR)/.cache/npm/node_modules/.bin:$$PATH" \
		npm pack ./clients/typescript --pack-destination .cache

test: .venv/dev .cache/pocket_chat/config.json .cache/chromium/chromium $(CLIENT_CHECKS)
	$(BIN)/python -m pytest -p tests.affected --numprocesses $(PROCESSES) $(BY_FILE)

# The tests nearest to your changes, and those that failed last time: at most 60 seconds of tests
# in three processes.
quick: .venv/dev
	$(BIN)/python -m pytest -p tests.affected --affected 60 --numprocesses 3 $(BY_FILE)

# What takes too long for every change: twenty times the examples of the property tests, whole
# benchmarks, a soak of 10,000 jobs, chat by a real vLLM, and an image of each family, which is built
# and checked. FLAGS and PROOF are for `proof`.
test-deep: .venv/dev .cache/pocket_chat/config.json
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -m hypothesis --timeout=3600 --numprocesses $(PROCESSES)
	$(BIN)/python -m pytest -m deep
	$(BIN)/python -m tests.soak 10000
	$(BIN)/python -m tests.prove_vllm
	$(MAKE) proof FAMILY=sdxl
	$(MAKE) proof FAMILY=chat
	$(MAKE) proof FAMILY=wan

# The first thing to run where there is a CUDA device. It leaves outputs/gpu: what works, what is
# slow, and what is not as it was counted. FLAGS are the command's, for example
# FLAGS="--minutes 5 --only machine,sdxl". PYTHON_GPU is another interpreter that has the packages.
gpu: $(if $(PYTHON_GPU),,.venv/dev)
	$(or $(PYTHON_GPU),$(BIN)/python) -m benchmarks.gpu --device $(DEVICE) $(FLAGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m builder.contract --check
	$(BIN)/python -m builder.hub_listing --check

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# By Docker, or by buildah where there is none; FLAGS go to either.
image:
	@if docker buildx version >/dev/null 2>&1; then \
		CUDA=$(CUDA) docker buildx bake --load $(FLAGS) $(FAMILY); \
	else \
		buildah build --layers $(FLAGS) --build-arg FAMILY=$(FAMILY) --build-arg CUDA=$(CUDA) \
			--tag $(IMAGE) .; \
	fi

# PROOF has more options of `tests.prove_image`, for example "--engine podman".
proof: image .venv/dev .cache/pocket_chat/config.json
	$(BIN)/python -m tests.prove_image --image $(IMAGE) --family $(FAMILY) \
		--volume "$(CURDIR)/.cache:/worker/.cache:ro" $(PROOF)

clean:
	rm -rf .venv .cache outputs

# `venv` writes the interpreter before pip: only `.venv/made` shows that both are there.
.venv/made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed"; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run: requirements.txt | .venv/made
	@index="$(TORCH_INDEX)"; torch="$(TORCH)"; \
	if [ -n "$$index" ] && [ -n "$$torch" ]; then \
		echo "No NVIDIA GPU was found: $$torch for the processor comes from $$index"; \
		$(BIN)/pip install --progress-bar on --no-deps --retries 0 --timeout 15 \
			--index-url "$$index" "$$torch" || \
		echo "That failed, so PyPI's torch follows, with 2.8 GB of CUDA libraries"; \
	fi
	$(BIN)/pip install --progress-bar on -r requirements.txt
	@touch $@

# The one model that is not in the repository: 90 MB, converted once, which takes a minute.
.cache/pocket_chat/config.json: | .venv/run
	$(BIN)/pip install --progress-bar on gguf==0.19.0
	$(BIN)/python -m builder.pocket_chat

# What the page's tests look through. Without it they take a browser on PATH, or are skipped.
.cache/chromium/chromium: | .venv/dev
	-$(BIN)/python -m builder.browser

# TypeScript's own compiler, which builds the client's package, and two linters that check it.
# Without npm those tests are skipped.
$(CLIENT_CHECKS): tests/clients/npm/package-lock.json
	-mkdir -p .cache/npm && cp tests/clients/npm/package*.json .cache/npm/ && \
	npm ci --prefix .cache/npm --ignore-scripts --no-audit --no-fund && touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/pip install --progress-bar on -r requirements-dev.txt
	@touch $@
