# MedGS in a container. Two stages to choose from:
#
#     docker build --target cpu  -t medgs:cpu .
#     docker build --target cuda -t medgs:cuda .      # kernels for sm_75 to sm_90, compiled in the image
#     docker run --rm --gpus all --user $(id -u):$(id -g) -v $PWD:/data medgs:cuda -i /data/volume.nii.gz -o /data/out
#
# Everything is compiled while the image is built: a container starts at once, and needs neither compiler nor network.
# `.ci/container` runs the steps of the first stage one by one in a clean root, where there is no Docker.

FROM debian:bookworm-slim AS cpu
ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MPLCONFIGDIR=/tmp/matplotlib
RUN pip install $TORCH && pip install setuptools wheel
WORKDIR /opt/medgs
COPY . .
RUN pip install --no-build-isolation submodules/diff-gaussian-rasterization submodules/simple-knn \
 && pip install -r requirements-optional.txt . && rm -rf build submodules/*/build
WORKDIR /data
ENTRYPOINT ["medgs"]

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
ARG TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130"
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MPLCONFIGDIR=/tmp/matplotlib \
    TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;8.9;9.0+PTX" FORCE_CUDA=1
RUN pip install $TORCH && pip install setuptools wheel
WORKDIR /opt/medgs
COPY . .
RUN pip install --no-build-isolation submodules/diff-gaussian-rasterization submodules/simple-knn \
 && pip install -r requirements-optional.txt . && rm -rf build submodules/*/build
WORKDIR /data
ENTRYPOINT ["medgs"]
