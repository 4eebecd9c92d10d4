# The image of every node of a cluster, head or worker: Python 3.12, the versions of requirements.lock, this project in /app.
#     docker build --tag REGISTRY/ray-dfine:latest . && docker push REGISTRY/ray-dfine:latest
# CUDA comes with the packages; the nodes need a driver, 580 or newer for CUDA 13.
FROM python:3.12-slim-trixie

# bash and wget: KubeRay starts and probes its containers with them. rsync and ssh: `ray up` copies files into the containers with
# rsync, and its head node reaches the workers by ssh.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

# Packages go into Python's own folders: a login shell, which `ray up` uses, forgets the PATH of a virtual environment.
# Compiled bytecode: the user below cannot write any, and without it every process compiles all packages again.
ARG PYTHON=/usr/local/bin/python
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
WORKDIR /app
RUN $PYTHON -m pip install --root-user-action ignore uv==0.13.9

# Everything but the tools of development, in the versions of the lock; boto3 is what `ray up` starts machines on AWS with.
COPY requirements.lock pyproject.toml ./
RUN $PYTHON -m uv pip install --python $PYTHON --compile-bytecode --only-binary :all: \
    --constraint requirements.lock --requirement pyproject.toml --extra serve --extra export boto3

COPY . ./
RUN $PYTHON -m uv pip install --python $PYTHON --no-deps --editable . \
    && $PYTHON -m compileall -q dfine_core pipeline jobs

# 1000 is also the user of Ubuntu's machine images, so that files which `ray up` copies keep their owner. `ray up` reads HOME.
RUN useradd --create-home --uid 1000 --shell /bin/bash dfine
ENV HOME=/home/dfine
USER 1000
WORKDIR /home/dfine
CMD ["dfine", "--help"]
