"""Running programs that a model wrote, and nothing they do outlives them.

A program gets its own session, PID, network, IPC and mount namespaces (util-linux's `unshare`), a root folder in
memory that holds a read-only Python and nothing else, no capabilities, and limits on time, memory, file size, files
and processes. When it ends or its time is over, the kernel kills whatever it started and its folder goes with its
mounts. A system without these means gets a refusal, never an unconfined run.

    verdict = run("def f(x): return x + 1", "assert f(1) == 2")
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dllm.errors import DllmError

_TOOLS = ("unshare", "mount", "umount", "pivot_root", "setpriv", "prlimit", "sh")
# One user for each run of a root caller: the limit on processes counts per user, and does not bind root.
_UIDS = range(40_000, 60_000)

# Runs as pid 1 of the new namespaces. $1: an empty folder, $2: bytes of the scratch space, $3…: read-only folders,
# "--", the command. The new root is a tmpfs, so the program sees none of the user's files.
_ENTER = r"""
set -e
umask 022
root=$1; size=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o "size=$size,nr_inodes=4096,mode=755" tmpfs "$root"
mkdir -p "$root/tmp" "$root/dev" "$root/.old"
chmod 1777 "$root/tmp"
for device in null zero urandom; do : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
while [ "$1" != -- ]; do
  if [ -L "$1" ]; then mkdir -p "$root$(dirname "$1")"; ln -s "$(readlink "$1")" "$root$1"
  elif [ -d "$1" ]; then
    mkdir -p "$root$1"; mount --bind -o ro "$1" "$root$1"
    [ ! -w "$root$1" ] || mount -o remount,bind,ro "$1" "$root$1"  # older tools need the second step
    [ ! -w "$root$1" ] || { echo "$1 stays writable"; exit 1; }
  fi
  shift
done
shift
cd "$root"
pivot_root . .old
exec "$@"
"""
# After the pivot: let go of the old root and run Python without any privilege. The shell stays as pid 1, out of the
# program's reach: it holds the order to die with its parent (which a process that changes its user loses), and with
# it dies the whole namespace.
_LEAVE = r"""
set -e
ln -s .old/proc /proc  # umount looks its target up there
umount -l /.old
rm /proc
rmdir /.old
mount -o remount,mode=555 / 2>/dev/null || chmod 555 /
cd /tmp
drop="--no-new-privs --inh-caps=-all --bounding-set=-all"
[ "$1" = root ] && drop="$drop --reuid=$2 --regid=$2 --clear-groups"
limits=$3; shift 3
setpriv $drop prlimit $limits -- "$@"
exit $?
"""
# The body comes on a descriptor, and the token only after the check has run to its end: sys.exit(0) in an answer is
# no pass.
_DRIVER = r"""
import sys
parts = sys.stdin.read().split("\0")
scope = {"__name__": "answer"}
exec(compile(parts[0], "answer.py", "exec"), scope)
exec(compile(parts[1], "check.py", "exec"), scope)
sys.stdout.write("\n" + parts[2] + "\n")
sys.stdout.flush()
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use. The defaults are those of the usual code benchmarks, with room for Python itself."""

    seconds: float = 5.0  # of wall-clock time; the CPU limit is the next whole second
    memory_mb: int = 512  # of address space, per process
    file_mb: int = 8  # per file, and of the whole scratch folder
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """How a program ended. `status`: `passed`, `failed` (an exception, a wrong exit), or `timeout`."""

    status: str
    output: str  # the end of stdout and stderr
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(program: str, check: str = "", limits: Limits = Limits()) -> Verdict:
    """Execute `program`, then `check` in the same scope, confined. Raises `DllmError` where this system cannot
    confine."""
    reason = refusal()
    if reason:
        raise DllmError(reason)
    return _run(program, check, limits)


@functools.cache
def refusal() -> str | None:
    """Why programs cannot be confined here, or None. Found out by confining one."""
    advice = "generated programs are not run; use Linux with util-linux and user namespaces, or a task that runs none"
    if not sys.platform.startswith("linux"):
        return f"this system ({sys.platform}) has no namespaces, so {advice}"
    missing = [tool for tool in _TOOLS if not _which(tool)]
    if missing:
        return f"{', '.join(missing)} not found, so {advice}"
    verdict = _run("", "", Limits(seconds=20))
    if not verdict.passed:
        last = (verdict.output.strip().splitlines() or [verdict.status])[-1]
        return f"this system does not let a process be confined ({last}), so {advice}"
    return None


def _run(program: str, check: str, limits: Limits) -> Verdict:
    token = secrets.token_hex(16)
    body = "\0".join((program.replace("\0", ""), check.replace("\0", ""), token))
    root = tempfile.mkdtemp(
        prefix="dllm-confined-"
    )  # stays empty outside: the tmpfs is in the program's own mount namespace
    start = time.monotonic()
    try:
        with tempfile.TemporaryFile() as out:  # a file, so that the limit on file size also bounds what is printed
            process = subprocess.Popen(
                _command(root, limits),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                start_new_session=True,
                cwd="/",
            )
            timed_out = False
            try:
                process.communicate(body.encode("utf-8", "replace"), timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:  # also when this process is interrupted
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            size = out.seek(0, os.SEEK_END)
            out.seek(max(0, size - 4096))
            text = out.read().decode("utf-8", "replace")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - start
    if timed_out:
        return Verdict("timeout", text, seconds)
    passed = process.returncode == 0 and text.endswith(f"\n{token}\n")
    return Verdict("passed" if passed else "failed", text.removesuffix(f"\n{token}\n"), seconds)


def _command(root: str, limits: Limits) -> list[str]:
    privileged = os.geteuid() == 0
    who = "root" if privileged else "user"
    rlimits = (
        f"--cpu={int(limits.seconds) + 1} --as={limits.memory_mb << 20} --fsize={limits.file_mb << 20} "
        f"--nproc={limits.processes} --nofile={limits.open_files} --core=0"
    )
    identity = [] if privileged else ["--user", "--map-root-user"]
    python = [sys_python(), "-I", "-S", "-B", "-c", _DRIVER]
    return [
        *(
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *identity,
            "--pid",
            "--fork",
            "--kill-child",
            "--net",
            "--ipc",
            "--uts",
            "--mount",
        ),
        *("sh", "-c", _ENTER, "enter", root, str(limits.file_mb << 20), *_folders(), "--"),
        *("sh", "-c", _LEAVE, "leave", who, str(secrets.choice(_UIDS)), rlimits, *python),
    ]


def sys_python() -> str:
    """The interpreter behind a virtual environment: it needs one folder besides the system's libraries."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _folders() -> list[str]:
    """What the program may read: the system's libraries and tools, and Python's own folder."""
    base = [str(Path(sys.base_prefix).resolve()), str(Path(sysconfig.get_paths()["stdlib"]).resolve())]
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32"]
    inside = [p for p in base if not any(Path(p).is_relative_to(s) for s in system)]
    return [*(p for p in system if os.path.exists(p)), *dict.fromkeys(p for p in inside if _outermost(p, inside))]


def _outermost(path: str, paths: list[str]) -> bool:
    return not any(path != other and Path(path).is_relative_to(other) for other in paths)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")
