# `make repro` on a CPU, from packages whose hashes are in environment/ (Linux on x86-64, Python 3.11)
#
#   docker build -t mednext_v2 . && docker run --name repro mednext_v2 && docker cp repro:/home/reader/mednext_v2/results .
#
# PyTorch comes from PyPI, with NVIDIA's libraries, which it loads without a GPU too. Its CPU build, smaller by gigabytes, is in PyTorch's own index:
# add --build-arg TORCH=cpu --build-arg PIP_EXTRA_INDEX_URL=<that index>
FROM python:3.11-slim

# Debian keeps no old versions of packages, so a pinned one would soon be gone
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 reader \
    && install --directory --owner=reader /home/reader/mednext_v2

USER 1000
WORKDIR /home/reader/mednext_v2
ENV VENV=/home/reader/venv
ENV PATH="$VENV/bin:$PATH" \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

ARG TORCH=nvidia
ARG PIP_EXTRA_INDEX_URL
COPY --chown=reader environment environment
RUN python -m venv "$VENV" \
    && pip install --no-deps --require-hashes -r environment/build.txt \
    && pip install --no-deps --require-hashes --no-build-isolation -r environment/all.txt \
    && pip install --no-deps --require-hashes -r "environment/torch-$TORCH.txt"

# With .git: DVC needs it, and each table says of which commit it is
COPY --chown=reader . .
RUN pip install --no-deps --no-build-isolation --editable . && touch "$VENV/.pipeline" "$VENV/.ready"

CMD ["make", "repro"]
