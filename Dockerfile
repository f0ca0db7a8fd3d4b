# mmft with its server, for CPUs and NVIDIA GPUs:
#   docker build -t mmft .
#   docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" mmft model=qwen2vl data=coco500
# The server in a container: -e MMFT_SERVE_TOKEN=... -p 8000:8000 mmft serve run=DIR host=0.0.0.0
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 mmft && mkdir /work /cache && chown mmft /work /cache
COPY pyproject.toml README.md LICENSE /source/
COPY mmft /source/mmft
COPY conf /source/conf
RUN pip install --no-cache-dir "/source[serve,metrics,sweep]" && rm -r /source

ENV HF_HOME=/cache PYTHONUNBUFFERED=1
USER mmft
WORKDIR /work
ENTRYPOINT ["mmft"]
CMD ["--help"]
