# megatron_hbp on NVIDIA's PyTorch image, with the fused kernels that Megatron-LM uses on GPUs.
#
#   docker build -t megatron-hbp .
#   docker run --gpus all --ipc=host --rm -it -v "$PWD/out:/out" megatron-hbp hbp --help
#
# Compiling transformer-engine, flash-attn and apex takes long: leave out those that the base image brings in a suitable
# version.
FROM nvcr.io/nvidia/pytorch:26.06-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# flash-attn and apex compile for these GPUs only (Hopper, Blackwell); each compiler job takes about 4 GB.
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"
ARG MAX_JOBS=8
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d

# --no-deps wherever torch is a dependency: the base's torch is NVIDIA's own build and must not be replaced.
RUN pip install --no-cache-dir --no-deps megatron-core==0.19.2 \
    && pip install --no-cache-dir --no-deps --no-build-isolation \
        transformer-engine==2.17.1 transformer-engine-cu13==2.17.1 transformer-engine-torch==2.17.1 \
    && pip install --no-cache-dir --no-deps --no-build-isolation flash-attn==2.8.3 \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-deps --no-build-isolation \
        "apex @ git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"

# The other dependencies of pyproject.toml; the base's own constraints decide where the two overlap.
RUN pip install --no-cache-dir \
        "transformers>=5,<6" "tokenizers>=0.22,<1" "jinja2>=3.1.6,<4" "safetensors>=0.6,<1" "pyarrow>=20" \
        "psutil>=6" "rich>=14" "typer>=0.16,<1" "matplotlib>=3.10,<4" "tensorboard>=2.19,<3" "einops>=0.8,<1"

WORKDIR /opt/megatron-hbp
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python -c "import megatron.core, megatron_hbp.cli"

CMD ["hbp", "--help"]
