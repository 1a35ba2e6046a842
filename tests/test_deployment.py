"""The Dockerfile and the page on deployment, held against the README, the command line and the server's routes."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dllm.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The steps of the Dockerfile."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def steps(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def parsed(line: str) -> None:
    """Errors: no command of ours, or arguments that it does not take."""
    name, *arguments = line.partition("  #")[0].split()[1:]
    command = typer.main.get_command(app)
    found = command.get_command(None, name)  # type: ignore[attr-defined, arg-type]
    assert found is not None, line
    found.make_context(name, arguments)


def test_the_container_installs_as_the_readme_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"<!-- ci: main -->\n```bash\n(.*?)\n", readme)
    (install,) = (step for step in steps("RUN") if step.startswith("pip "))
    assert first is not None
    assert install.replace("--no-cache-dir ", "").replace("'.[serve]'", ".") == first[1]


def test_all_that_the_installation_reads_is_copied() -> None:
    copied = [name for step in steps("COPY") for name in step.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["package-dir"].values()
    named = [*packages, project["project"]["readme"], *project["project"]["license-files"], "build_backend.py"]
    assert {*named, "pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt"} == {*copied}
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(copied)


def test_the_container_runs_a_command_of_ours() -> None:
    (entry,), (given,) = steps("ENTRYPOINT"), steps("CMD")
    parsed(" ".join(json.loads(entry) + json.loads(given)))
    order = [name for name, _ in instructions()]
    assert order.index("USER") < order.index("ENTRYPOINT")  # not as root


def test_commands_of_the_page_are_ours() -> None:
    lines = [line for block in fenced(PAGE, "bash") for line in block.splitlines()]
    ours = [line for line in lines if line.startswith("dllm ")]
    assert len(ours) == 3
    for line in ours:
        parsed(line)
    (run,) = (line for line in lines if line.startswith("docker run"))
    parsed("dllm serve " + run.partition(" dllm ")[2])


def test_probes_and_scrapes_ask_for_routes_that_there_are() -> None:
    pytest.importorskip("fastapi")
    from dllm import Engine
    from dllm.serve.app import create_app

    with Engine("tiny") as engine:
        routes = {route.path for route in create_app(engine).routes}  # type: ignore[attr-defined]
    scrape, pod = (yaml.safe_load(block) for block in fenced(PAGE, "yaml"))
    (container,) = pod["spec"]["containers"]
    probes: list[Any] = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    (health,) = (rest for name, rest in instructions() if name == "HEALTHCHECK")
    asked = re.search(r"127\.0\.0\.1:(\d+)(/[\w/]+)", health)
    assert asked is not None
    paths = [probe["path"] for probe in probes] + [job["metrics_path"] for job in scrape["scrape_configs"]]
    assert {*paths, asked[2], pod["metadata"]["annotations"]["prometheus.io/path"]} <= routes
    ports = {probe["port"] for probe in probes} | {container["ports"][0]["containerPort"], int(asked[1])}
    assert ports == {int(steps("EXPOSE")[0])}


def test_the_page_names_every_figure() -> None:
    pytest.importorskip("prometheus_client")
    from types import SimpleNamespace

    from dllm.call.engine import Load
    from dllm.serve.metrics import Metrics

    load = Load(running=0, waiting=0, groups=0, kv_bytes=0, requests=0, lanes=1)
    metrics = Metrics(SimpleNamespace(load=load, model=None), "x")  # type: ignore[arg-type]
    names = {family.name.removeprefix("dllm_") for family in metrics.collect()}
    said = {name.partition("{")[0] for name in re.findall(r"`([a-z_]+(?:\{[^`]*\})?)`", PAGE)}
    assert names <= {name.removesuffix("_total").removesuffix("_info") for name in said} | said
