# pore's commands, its server and its page, on a CPU:
#
#   docker build -t pore .
#   docker run -p 8000:8000 pore                                   # serves the embedded model
#   docker run -v "$PWD:/data:ro" pore generate /data/photo.png "What is this?"
#
# With a GPU, give PyTorch's index for its CUDA, and start it with `docker run --gpus all`:
#
#   docker build -t pore --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /opt/pore/
RUN pip install --no-cache-dir -c /opt/pore/constraints.txt --index-url "$TORCH_INDEX" torch
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /opt/pore/constraints.txt "$(echo /wheels/pore_vlm-*.whl)[plot,serve,ui]"

# Checkpoints of the hub are kept in the user's folder: mount /home/pore/.cache to keep them longer.
RUN useradd --create-home --uid 1000 pore
USER 1000:1000
WORKDIR /home/pore
EXPOSE 8000
# Of the server; what runs another command has no use for it.
HEALTHCHECK --start-period=5m --timeout=5s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["pore"]
CMD ["serve", "--host", "0.0.0.0"]
