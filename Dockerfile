# syntax=docker/dockerfile:1
# raybert and Ray, for every node of a cluster.
#   docker build --tag REGISTRY/raybert:0.1.0-cuda .
#   docker build --tag REGISTRY/raybert:0.1.0-cpu --build-arg TORCH_INDEX=URL .
# The package index's own torch for Linux is built for CUDA. URL is PyTorch's index of CPU builds, a tenth of the size
# (pytorch.org, Get Started, Compute Platform CPU).
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PATH=/opt/raybert/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY raybert raybert
# Torch alone comes from the other index: as a second index for everything it could replace any package. The last line
# loads the vocabulary, whose hash is checked.
RUN python -m venv /opt/raybert \
    && if [ -n "$TORCH_INDEX" ]; then pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --no-deps torch; fi \
    && pip install --constraint constraints.txt ".[cluster,hf,hub]" \
    && python -I -c "from raybert.tokenizer import Tokenizer; Tokenizer()"

FROM ${PYTHON_IMAGE}
# ssh and rsync: the head of a `ray up` cluster starts its workers with them, in login shells, which set PATH anew.
# g++: torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home raybert \
    && echo "export PATH=/opt/raybert/bin:\$PATH" > /etc/profile.d/raybert.sh \
    && install --directory --owner=raybert --group=raybert /tmp/ray /home/raybert/.ray
COPY --from=build /opt/raybert /opt/raybert
# `ray up` reads HOME from the image, to mount the token where Ray looks for it.
ENV HOME=/home/raybert PATH=/opt/raybert/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/raybert
CMD ["raybert", "--help"]
