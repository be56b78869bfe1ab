ARG CUDA=13.0
ARG BASE_IMAGE=nvidia/cuda:${CUDA}.1-base-ubuntu24.04
ARG FAMILY=sdxl
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# Builds the image of one family. Run `make image FAMILY=sdxl`, `docker buildx bake`, or
#
#   docker build --build-arg FAMILY=sdxl --tag ourvidz-sdxl .
#
#   CUDA         13.0, or 12.8 for hosts whose driver is older than 580; it chooses base and torch
#   BASE_IMAGE   a Debian or Ubuntu whose python3 is 3.11 or 3.12
#   FAMILY       what the image serves unless FAMILIES is set: sdxl, chat, wan
#   BAKE         1 bakes the family's default weights into the image (builder/models.json)
#   TORCH_INDEX  an index with another build of torch, such as https://download.pytorch.org/whl/cpu;
#                that wheel is then chosen by version, since the lock has hashes of PyPI's only
#   COMPILER     1 adds gcc and Python's headers, which Triton needs for COMPILE=regional
#   VLLM_IMAGE   vLLM's published image, for the target chat-vllm alone
#   VERSION, REVISION, SOURCE   for the labels
#
# Why these two. PyPI's wheel of torch 2.13.0 is built for CUDA 13.0, and that of 2.10.0 for 12.8;
# 2.10.0 is the last one for 12.8 there, and from 2.12 on PyTorch builds none. Both support Blackwell.
#
# Why this base. The wheels require cuBLAS, cuDNN and the other libraries as wheels. So the base is
# NVIDIA's smallest image: a `runtime` or `cudnn` image, or one with torch, would have the same gigabytes twice. To a
# plain Ubuntu it adds NVIDIA_REQUIRE_CUDA, by which a host with too old a driver refuses the
# container in one line, and libraries for forward compatibility.


FROM ${BASE_IMAGE} AS system
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home worker
# Triton compiles a small launcher in C for each kernel, against Python.h. Most workers compile
# nothing and need no compiler.
ARG COMPILER=0
RUN if [ "$COMPILER" = 1 ]; then \
        apt-get update \
     && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
     && rm -rf /var/lib/apt/lists/*; \
    fi


# The stages `torch` and `packages` install; their tools stay out of the image. torch has a layer of
# its own: gigabytes that a change of another requirement leaves as they are. All families share
# these two layers, on a builder, in a registry and on a host.
#
# The lock files name everything that is installed, with its hashes. Only wheels are installed, since
# a source distribution would download its build tools. `--no-deps`, since the locks are complete.
#
# Byte code is marked as never stale. By default Python compares times, which registries and
# snapshots may change, and then compiles all modules again at each cold start. (`|| true`: a wheel
# may have a file for a newer Python.)
FROM system AS torch
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_DEPS=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_PROGRESS_BAR=off \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_ROOT_USER_ACTION=ignore
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/venv
ARG CUDA
ARG TORCH_INDEX=
COPY requirements.torch.cuda${CUDA}.lock /tmp/requirements.torch.lock
RUN if [ -z "$TORCH_INDEX" ]; then \
        /opt/pip/bin/pip install --no-compile \
            --require-hashes --requirement /tmp/requirements.torch.lock; \
    else \
        torch="$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /tmp/requirements.torch.lock)" \
     && /opt/pip/bin/pip install --no-compile --extra-index-url "$TORCH_INDEX" "$torch"; \
    fi \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true; }


FROM torch AS packages
ARG C2PA=0
COPY requirements.lock requirements-c2pa.lock /tmp/
RUN /opt/pip/bin/pip install --no-compile --prefix /opt/packages \
        --require-hashes --requirement /tmp/requirements.lock \
 && if [ "$C2PA" = 1 ]; then \
        /opt/pip/bin/pip install --no-compile --prefix /opt/packages \
            --require-hashes --requirement /tmp/requirements-c2pa.lock; \
    fi \
 && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash \
        -s /opt/packages -p /opt/venv /opt/packages || true; }


FROM system AS runtime
COPY --from=torch /opt/venv /opt/venv
COPY --from=packages /opt/packages /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1


FROM runtime AS weights
ARG FAMILY
ARG BAKE=0
WORKDIR /fetch
COPY builder/__init__.py builder/fetch_models.py builder/models.json builder/models.lock.json builder/
COPY ourvidz_serverless/__init__.py ourvidz_serverless/deadline.py ourvidz_serverless/
COPY ourvidz_serverless/net/__init__.py ourvidz_serverless/net/hub.py \
     ourvidz_serverless/net/retries.py ourvidz_serverless/net/signed_urls.py ourvidz_serverless/net/
RUN --mount=type=secret,id=HF_TOKEN \
    mkdir /models \
 && if [ "$BAKE" = 1 ]; then \
        cp builder/models.lock.json /models/ \
     && HF_TOKEN_PATH=/run/secrets/HF_TOKEN python -m builder.fetch_models \
            --family "$FAMILY" --dest /models --lock /models/models.lock.json; \
    fi


FROM weights AS bill
ARG FAMILY
ARG VERSION=0
COPY builder/sbom.py builder/
COPY pocket pocket
RUN python -m builder.sbom --name "ourvidz-$FAMILY" --version "$VERSION" \
        --weights /models pocket --dest /sbom.cdx.json


# `docker buildx bake chat-vllm`: vLLM's published image with this worker beside it. The worker starts
# vLLM and asks it over HTTP, and imports no torch. So it has an environment of its own, without
# torch, and neither side's versions concern the other. Its packages are for Python 3.12, which that
# image has; with another one the build ends at the first command.
FROM ${VLLM_IMAGE} AS chat-vllm
RUN python3 -c 'import sys; assert sys.version_info[:2] == (3, 12), sys.version' \
 && python3 -m venv --without-pip /opt/worker \
 && useradd --uid 10001 --create-home worker
COPY --from=packages /opt/packages /opt/worker
WORKDIR /worker
COPY --from=weights /models models
COPY LICENSE NOTICE handler.py ./
COPY test_input.chat.json test_input.json
COPY ourvidz_serverless ourvidz_serverless
RUN /opt/worker/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        handler.py ourvidz_serverless \
 && install --directory --mode 1777 outputs models \
 && CHAT_ENGINE=openai /opt/worker/bin/python -c \
        'import handler, ourvidz_serverless.worker, ourvidz_serverless.serving.runpod_queue'
# The folder of the weights and a free port are put in for {model} and {port}.
ENV CHAT_ENGINE=openai \
    CHAT_SERVER_COMMAND="vllm serve {model} --host 127.0.0.1 --port {port}" \
    FAMILIES=chat \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1 \
    RUNPOD_LOG_LEVEL=INFO \
    VLLM_NO_USAGE_STATS=1
ARG VERSION=0
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="ourvidz-serverless chat-vllm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
USER 10001
ENTRYPOINT ["/opt/worker/bin/python", "handler.py"]


# No HEALTHCHECK, since nothing would read it: RunPod checks a worker of a queue by its polls and
# heartbeats, and asks a load-balancing worker for `/ping`.
FROM runtime AS worker
ARG FAMILY
# Any user may write to `outputs` and `models`, as to /tmp: `docker run --user` has one of its own.
WORKDIR /worker
COPY --from=weights /models models
COPY pocket pocket
COPY --from=bill /sbom.cdx.json ./
COPY LICENSE NOTICE handler.py test_input*.json ./
COPY ourvidz_serverless ourvidz_serverless
RUN python -m compileall -q --invalidation-mode unchecked-hash handler.py ourvidz_serverless \
 && if [ -f "test_input.$FAMILY.json" ]; then mv "test_input.$FAMILY.json" test_input.json; fi \
 && install --directory --mode 1777 outputs models
ENV FAMILIES=$FAMILY \
    HF_HUB_OFFLINE=1 \
    RUNPOD_LOG_LEVEL=INFO
ARG VERSION=0
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="ourvidz-serverless $FAMILY" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
USER 10001
# Python is PID 1 and receives SIGTERM itself.
ENTRYPOINT ["/opt/venv/bin/python", "handler.py"]
