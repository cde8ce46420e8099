# Without a GPU:  docker build -t thinkswitch .
# With CUDA:      docker build -t thinkswitch --build-arg ACCELERATOR=cuda .
# Then, with the runs, the cached models and your own recipes on the host:
#   docker run --rm -v "$PWD/runs:/thinkswitch/runs" thinkswitch iterate --domain arithmetic
#   docker run --rm --gpus all -v "$PWD/runs:/thinkswitch/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       -v "$PWD/recipes/mine.yaml:/thinkswitch/recipes/mine.yaml" thinkswitch iterate --domain mine
# The project's tests do not build this image.
FROM python:3.11-slim
ARG ACCELERATOR=cpu

# Triton and vLLM compile kernels when they start.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /thinkswitch
COPY . .
RUN case "$ACCELERATOR" in \
        cpu) list=cpu ;; \
        cuda) list=gpu ;; \
        *) echo "ACCELERATOR=$ACCELERATOR is unknown; use cpu or cuda." >&2; exit 1 ;; \
    esac \
    && PYTHON=python requirements/install.sh .venv requirements/train.txt \
    && PYTHON=python requirements/install.sh .venv-vllm "requirements/vllm-$list.txt"

ENV PATH=/thinkswitch/.venv/bin:$PATH
ENTRYPOINT ["thinkswitch"]
CMD ["--help"]
