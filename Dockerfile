# MedGS in a container. Two stages to choose from:
#
#     docker build --target cpu  -t medgs:cpu .
#     docker build --target cuda -t medgs:cuda .      # kernels for sm_75 to sm_90, compiled in the image
#     docker run --rm --gpus all -v $PWD:/data medgs:cuda -i /data/volume.nii.gz -o /data/out
#
# Everything is compiled while the image is built: a container starts at once, and needs neither compiler nor network.

FROM python:3.12-slim-bookworm AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 TORCH_EXTENSIONS_DIR=/opt/medgs/extensions
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu && pip install setuptools wheel ninja
WORKDIR /opt/medgs/source
COPY . .
RUN pip install --no-build-isolation submodules/diff-gaussian-rasterization submodules/simple-knn \
 && pip install -r requirements-optional.txt . && rm -rf build submodules/*/build
WORKDIR /data
ENTRYPOINT ["medgs"]

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TORCH_EXTENSIONS_DIR=/opt/medgs/extensions TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;8.9;9.0+PTX" FORCE_CUDA=1
RUN pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130 && pip install setuptools wheel ninja
WORKDIR /opt/medgs/source
COPY . .
RUN pip install --no-build-isolation submodules/diff-gaussian-rasterization submodules/simple-knn \
 && pip install -r requirements-optional.txt . && rm -rf build submodules/*/build
WORKDIR /data
ENTRYPOINT ["medgs"]
