ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG FAMILY=sdxl

# One image a family, by the same lines. Built by `make image FAMILY=sdxl`, `docker buildx bake`, or
#
#   docker build --build-arg FAMILY=sdxl --tag ourvidz-sdxl .
#
#   BASE_IMAGE   a Debian or Ubuntu whose python3 is 3.11 or 3.12
#   FAMILY       what the image serves unless FAMILIES says otherwise: sdxl, chat, wan
#   BAKE         1 bakes the family's default weights into the image (builder/models.json)
#   TORCH_INDEX  where to find another build of torch, such as https://download.pytorch.org/whl/cpu;
#                that one wheel is then taken by its version, since the lock knows only PyPI's
#   COMPILER     1 adds gcc and Python's headers, which Triton needs for COMPILE=regional
#   VERSION, REVISION, SOURCE   for the labels
#
# Why this base. torch 2.13.0's wheel is built for CUDA 13.0, which knows Blackwell (12.8 was the
# first that did), and brings cuBLAS, cuDNN and the rest as wheels of its own. So the base is the
# smallest of NVIDIA's: a `runtime` or `cudnn` image, or one with torch in it, would hold the same
# gigabytes twice. What it adds to a bare Ubuntu is NVIDIA_REQUIRE_CUDA, which makes a host whose
# driver is too old refuse the container in one line, and libraries for forward compatibility.


FROM ${BASE_IMAGE} AS system
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home worker
# Triton compiles a small launcher in C for each kernel, against Python.h. Most workers compile
# nothing, so they do without.
ARG COMPILER=0
RUN if [ "$COMPILER" = 1 ]; then \
        apt-get update \
     && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
     && rm -rf /var/lib/apt/lists/*; \
    fi


# Whatever installs is left behind here. torch stands for itself, gigabytes that no change of
# another requirement moves; and every family has the same two layers of packages, on a builder, in
# a registry and on a host.
#
# Nothing is installed that the lock files do not name with its hashes: wheels alone, since a source
# distribution would fetch what builds it, and `--no-deps`, since the locks hold what each requires.
#
# Byte code is marked as never stale: by default Python compares times, which registries and
# snapshots may change, and then compiles everything anew at each cold start. (`|| true`: a wheel
# may hold a file that is written for a newer Python.)
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
ARG TORCH=2.13.0
ARG TORCH_INDEX=
COPY requirements.torch.lock /tmp/
RUN if [ -z "$TORCH_INDEX" ]; then \
        /opt/pip/bin/pip install --no-compile \
            --require-hashes --requirement /tmp/requirements.torch.lock; \
    else \
        /opt/pip/bin/pip install --no-compile --extra-index-url "$TORCH_INDEX" "torch==$TORCH"; \
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
COPY ourvidz_serverless/__init__.py ourvidz_serverless/
COPY ourvidz_serverless/net/__init__.py ourvidz_serverless/net/signed_urls.py ourvidz_serverless/net/
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


# No HEALTHCHECK, since nobody would look at it: RunPod knows a queue's worker by its polls and
# heartbeats, and asks a load-balancing one for `/ping` by itself.
FROM runtime AS worker
ARG FAMILY
WORKDIR /worker
COPY --from=weights /models models
COPY pocket pocket
COPY --from=bill /sbom.cdx.json ./
COPY NOTICE handler.py test_input*.json ./
COPY ourvidz_serverless ourvidz_serverless
RUN python -m compileall -q --invalidation-mode unchecked-hash handler.py ourvidz_serverless \
 && if [ -f "test_input.$FAMILY.json" ]; then mv "test_input.$FAMILY.json" test_input.json; fi \
 && install --directory --owner worker outputs
ENV FAMILIES=$FAMILY \
    HF_HUB_OFFLINE=1 \
    RUNPOD_LOG_LEVEL=INFO
ARG VERSION=0
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="ourvidz-serverless $FAMILY" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
USER 10001
# Python is PID 1 and hears SIGTERM itself.
ENTRYPOINT ["/opt/venv/bin/python", "handler.py"]
