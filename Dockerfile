# dllm serve in a container; the installation is the README's, with the extra [serve].
#   docker build -t dllm .
#   docker run -p 8000:8000 -e DLLM_API_KEY=... --gpus all dllm GSAI-ML/LLaDA-8B-Instruct --host 0.0.0.0
FROM python:3.11-slim

WORKDIR /opt/dllm
COPY pyproject.toml setup.py build_backend.py MANIFEST.in constraints.txt README.md LICENSE ./
COPY dllm dllm
COPY samplers samplers
COPY eval eval
RUN pip install --no-cache-dir -c constraints.txt -e '.[serve]'

# Weights go to a volume, so that a new container finds them; nothing else is written.
RUN useradd --create-home dllm && mkdir /weights && chown dllm /weights
USER dllm
ENV HF_HOME=/weights
VOLUME /weights

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
ENTRYPOINT ["dllm", "serve"]
CMD ["tiny", "--host", "0.0.0.0"]
