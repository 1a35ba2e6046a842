"""Generated programs that write outside, open sockets, fork without end or sleep for ever leave nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dllm.errors import DllmError
from dllm.eval.tasks import confined
from dllm.eval.tasks.confined import Limits, run

can = pytest.mark.skipif(
    confined.refusal() is not None, reason=f"programs cannot be confined here: {confined.refusal()}"
)


def processes(mark: str) -> list[int]:
    """Processes whose command line holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def gone(mark: str, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while processes(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes(mark)


@can
def test_a_right_program_passes_and_a_wrong_one_fails():
    assert run("def f(x):\n    return x + 1", "assert f(1) == 2").passed
    assert run("def f(x):\n    return x", "assert f(1) == 2").status == "failed"
    assert run("def f(:", "").status == "failed"


@can
@pytest.mark.parametrize("program", ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"])
def test_leaving_early_is_not_passing(program):
    assert not run(program, "assert False").passed


@can
def test_nothing_can_be_written_outside():
    mark = f"dllm-{secrets.token_hex(8)}"
    places = [tempfile.gettempdir(), str(Path.home()), "/usr", "/var/tmp", "/dev/shm", os.getcwd()]
    program = f"""
import os
for place in {places!r}:
    try:
        os.makedirs(place, exist_ok=True)
        open(os.path.join(place, {mark!r}), "w").write("x")
    except OSError:
        pass
assert {str(Path(__file__).parent)!r} not in os.environ.get("PWD", "") and not os.path.exists({__file__!r})
"""
    verdict = run(program)
    assert verdict.passed, verdict.output
    assert not [place for place in places if (Path(place) / mark).exists()]


@can
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        verdict = run(program)
        assert verdict.status == "failed" and "OSError" in verdict.output, verdict.output
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@can
def test_forking_without_end_is_stopped_and_cleared():
    before = len(os.listdir("/proc"))
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    verdict = run(program, limits=Limits(seconds=1.5))
    assert verdict.status == "timeout"
    end = time.monotonic() + 5
    while len(os.listdir("/proc")) > before + 20 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(os.listdir("/proc")) <= before + 20  # others come and go on this machine too


@can
def test_sleeping_for_ever_is_stopped_with_its_children():
    mark = f"mark{secrets.token_hex(8)}"
    program = f"""
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", {mark!r}], start_new_session=True)
import time; time.sleep(1000)
"""
    start = time.monotonic()
    assert run(program, limits=Limits(seconds=1)).status == "timeout"
    assert time.monotonic() - start < 4
    assert gone(mark)


@can
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("x = bytearray(10**10)", "MemoryError"),
        ("f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 10**6)", "OSError"),
        ("while True: print('x' * 10000)", ""),
    ],
)
def test_memory_files_and_output_are_bounded(program, error):
    verdict = run(program, limits=Limits(seconds=10))
    assert verdict.status == "failed" and error in verdict.output and len(verdict.output) <= 4096


@can
def test_privileges_are_gone():
    program = """
import os
for call in (lambda: os.chroot("/tmp"), lambda: os.setuid(0), lambda: os.mkdir("/usr/x"), lambda: open("/dev/sda")):
    try:
        call()
    except OSError:
        continue
    raise SystemExit("too much is allowed")
"""
    assert run(program).passed


@can
def test_no_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others run programs in the common one meanwhile
    assert run("x = 1").passed
    assert not run("import time; time.sleep(9)", limits=Limits(seconds=0.5)).passed
    assert not list(tmp_path.iterdir())


@can
def test_a_killed_evaluation_takes_its_program_with_it():
    mark = f"mark{secrets.token_hex(8)}"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(99)', '{mark}'])"
    body = f"from dllm.eval.tasks.confined import Limits, run\nrun({child!r}, limits=Limits(seconds=90))"
    parent = subprocess.Popen([sys.executable, "-c", body])
    try:
        end = time.monotonic() + 30
        while len(processes(mark)) < 2 and time.monotonic() < end:  # the parent's own command line holds the mark too
            time.sleep(0.05)
        assert len(processes(mark)) >= 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(mark)


def test_where_namespaces_work_nothing_is_refused():
    tools = all(map(confined._which, ("unshare", "mount", "umount", "pivot_root", "setpriv", "prlimit")))
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    probe = ["unshare", *user, "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    works = tools and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    assert not works or confined.refusal() is None, confined.refusal()


def test_where_it_cannot_be_confined_it_is_refused(monkeypatch):
    confined.refusal.cache_clear()
    monkeypatch.setattr(confined, "_which", lambda tool: None if tool == "unshare" else "/usr/bin/" + tool)
    try:
        with pytest.raises(DllmError, match="unshare not found, so generated programs are not run"):
            run("raise SystemExit(1)")
    finally:
        confined.refusal.cache_clear()


def test_a_sandbox_that_fails_is_a_refusal(monkeypatch):
    confined.refusal.cache_clear()
    monkeypatch.setattr(confined, "_ENTER", "echo no namespaces for you; exit 1")
    try:
        assert "no namespaces for you" in (confined.refusal() or "")
    finally:
        monkeypatch.undo()
        confined.refusal.cache_clear()
