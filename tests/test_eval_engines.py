"""More than one process: ranks of `accelerate launch`, and a local Ray cluster that loses a worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dllm.eval import run

MODEL = str(Path(__file__).parent / "golden" / "checkpoints" / "tiny-llada-trained")


def config(**changes):
    base = {
        "name": "t",
        "tasks": ["sudoku"],
        "model": {"name": MODEL, "device": "cpu"},
        "generate": {"max_new_tokens": 8, "block_length": 4},
        "sampler": "confidence",
        "limit": 8,
        "batch_size": 2,
        "warmup": 0,
    }
    return {**base, **changes}


def outcome(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted(({k: v for k, v in row.items() if k != "clock"} for row in rows), key=lambda row: row["index"])


def test_accelerate_ranks_share_the_work(tmp_path):
    pytest.importorskip("accelerate")
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config(engine={"kind": "accelerate"})), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    go = "import sys, torch\ntorch.set_num_threads(1)\nfrom dllm.eval import run\n"
    body = go + f"run({str(path)!r}, out={str(tmp_path / 'two')!r})"
    (tmp_path / "go.py").write_text(body)
    launch = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch,
        "--main_process_port",
        port,
        str(tmp_path / "go.py"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run(config(), out=tmp_path / "one", progress=False)
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert (tmp_path / "two" / "report.md").exists()


@pytest.mark.ray
def test_ray_survives_a_lost_worker(tmp_path):
    """Two workers, one killed with -9 while it decodes: every sample once, and the results of a local run."""
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    # A busy machine answers late; only the worker that is killed below may be taken for dead.
    patient = {
        "health_check_initial_delay_ms": 120_000,
        "health_check_timeout_ms": 120_000,
        "health_check_failure_threshold": 50,
        "worker_niceness": 0,  # Ray's own 15 starves them beside anything else
    }
    here = {"_node_ip_address": "127.0.0.1"}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=threads, _system_config=patient, **here
    )
    folder, killed, over = tmp_path / "ray", [], threading.Event()

    def kill_one() -> None:
        me = psutil.Process()
        while not over.is_set() and not killed:
            path = folder / "samples.jsonl"
            if path.exists() and path.stat().st_size:
                busy = [p for p in me.children(recursive=True) if "ray::Worker.all" in " ".join(p.cmdline())]
                if busy:
                    killed.append(busy[-1].pid)
                    os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    assassin = threading.Thread(target=kill_one)
    try:
        assassin.start()
        results = run(config(limit=40, engine={"kind": "ray", "workers": 2}), out=folder, progress=False)
        assert killed and results.exit_code == 0
    finally:
        over.set()
        assassin.join()
        ray.shutdown()
    run(config(limit=40), out=tmp_path / "one", progress=False)
    assert outcome(folder) == outcome(tmp_path / "one")
    assert len(outcome(folder)) == len({row["key"] for row in outcome(folder)}) == 40
