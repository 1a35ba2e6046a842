"""Running programs that a model wrote: they can neither see nor make their verdict, and nothing they do outlives them.

A program and its check are two processes in two sandboxes (`boundary` says what passes between them). A sandbox has
its own session, PID, network, IPC and mount namespaces, a root folder in memory that holds a read-only Python and
nothing else, no capabilities, no access to keys, shared memory or other namespaces (a filter of system calls), and
limits on time, memory, file size, files and processes. When a check ends or its time is over, the kernel kills
whatever was started and the folders go with their mounts. Where this cannot be had the programs are refused, unless
the caller says that they may run unconfined.

    verdict = run("def f(x): return x + 1", "assert f(1) == 2")
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm.errors import DllmError, unknown
from dllm.eval.tasks import boundary

log = logging.getLogger(__name__)

# One user for each sandbox of a root caller: the limit on processes counts per user, and does not bind root.
_UIDS = range(40_000, 60_000)
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_DRIVER = Path(boundary.__file__).read_text(encoding="utf-8")
_LONGEST = 16 << 20  # bytes of one message: what a program hands over at once
_TAIL = 4096  # bytes of output that are kept

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
    [ ! -w "$root$1" ] || { echo "$1 stays writable" >&2; exit 1; }
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
setpriv "$@"
exit $?
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use. The defaults are those of the usual code benchmarks, with room for Python itself."""

    seconds: float = 5.0  # of wall-clock time; the CPU limit is the next whole second
    memory_mb: int = 512  # of address space for each process, and of resident memory for all of them
    file_mb: int = 8  # per file, of the whole scratch folder, and of what is printed
    processes: int = 16
    open_files: int = 64

    def plain(self) -> dict[str, int]:
        """By the names that the operating system has for them."""
        size, cpu = self.memory_mb << 20, int(self.seconds) + 1
        files = {"FSIZE": self.file_mb << 20, "NOFILE": self.open_files}
        return {"CPU": cpu, "AS": size, **files, "NPROC": self.processes, "CORE": 0, "MSGQUEUE": 0}


@dataclass(frozen=True)
class Verdict:
    """How a program ended. `status`: `passed`, `failed` (an exception, a wrong exit), or `timeout`."""

    status: str
    output: str  # the end of what program and check printed
    seconds: float
    confined: bool = True

    @property
    def passed(self) -> bool:
        """Whether the check ran to its end."""
        return self.status == "passed"


# ------------------------------------------------------------------------------------------------------------ sandboxes


class Sandbox(ABC):
    """A way to confine a process."""

    name: str
    guarded = True  # whether the process filters its own system calls

    @abstractmethod
    def command(self, root: str, limits: Limits) -> list[str]:
        """The command that runs the driver confined; `root` is an empty folder of this run."""

    def missing(self) -> str | None:
        """What this system lacks, as far as that is known without a trial."""
        if not sys.platform.startswith("linux"):
            return f"this system ({sys.platform}) has no namespaces"
        if platform.machine() not in boundary.ARCHITECTURES:
            return f"there is no filter of system calls for {platform.machine()}"
        tools = [tool for tool in self.tools() if not shutil.which(tool, path=_PATH)]
        return f"{', '.join(tools)} not found" if tools else None

    def tools(self) -> Sequence[str]:
        """The programs of the system that it takes."""
        return ()

    def kill(self, process: subprocess.Popen[bytes], root: str) -> None:
        """End a process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Namespaces(Sandbox):
    """Namespaces made by util-linux's `unshare`."""

    name = "namespaces"

    def tools(self) -> Sequence[str]:
        """The programs of the system that it takes."""
        return ("unshare", "mount", "umount", "pivot_root", "setpriv", "sh")

    def command(self, root: str, limits: Limits) -> list[str]:
        """`unshare`, then `_ENTER` as pid 1 of the new namespaces."""
        privileged = os.geteuid() == 0
        identity = [] if privileged else ["--user", "--map-root-user"]
        unshare = ["unshare", *identity, "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts", "--mount"]
        return [
            *("setpriv", "--pdeathsig", "KILL", *unshare),
            *("sh", "-c", _ENTER, "enter", root, str(limits.file_mb << 20), *_folders(), "--"),
            *("sh", "-c", _LEAVE, "leave", *_drop(), "--", *_python(sys_python())),
        ]


class Bubblewrap(Sandbox):
    """Namespaces made by bubblewrap, which some systems permit where they forbid them to others."""

    name = "bubblewrap"

    def missing(self) -> str | None:
        """What is lacking, `bwrap` included."""
        return super().missing() or (None if shutil.which("bwrap") else "bwrap not found")

    def tools(self) -> Sequence[str]:
        """The programs of the system that it takes."""
        return ("setpriv",) if os.geteuid() == 0 else ()

    def command(self, root: str, limits: Limits) -> list[str]:
        """`bwrap` with an empty root that holds Python alone."""
        options = ["--die-with-parent", "--new-session", "--chdir", "/tmp", "--unshare-pid", "--unshare-ipc"]
        options += ["--unshare-net", "--unshare-uts", "--cap-drop", "ALL"]
        drop: list[str] = []
        if os.geteuid() == 0:  # root is bound by no limit on processes, so the program becomes somebody else
            options += [word for c in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{c}")]
            drop = ["setpriv", *_drop(), "--"]
        else:
            options += ["--unshare-user"]
        folders = _folders()
        for parent in dict.fromkeys(p for path in (*folders, "/dev/null") for p in [*Path(path).parents][-2::-1]):
            options += ["--perms", "0755", "--dir", str(parent)]
        for folder in folders:
            options += ["--symlink", os.readlink(folder), folder] if os.path.islink(folder) else []
            options += ["--ro-bind", folder, folder] if not os.path.islink(folder) else []
        for device in ("null", "zero", "urandom"):
            options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        scratch = ["--size", str(limits.file_mb << 20), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/"]
        return [shutil.which("bwrap") or "bwrap", *options, *scratch, "--", *drop, *_python(sys_python())]


class Docker(Sandbox):
    """A container of an image that holds Python; it has to be here already, for nothing is downloaded."""

    name = "docker"

    def __init__(self, image: str = ""):
        self.image = image or f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"

    def missing(self) -> str | None:
        """Docker, its daemon or the image."""
        if not (docker := shutil.which("docker")):
            return "docker not found"
        try:
            question = [docker, "image", "inspect", self.image]
            found = subprocess.run(question, capture_output=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "docker does not answer"
        if found.returncode == 0:
            return None
        said = found.stderr.decode("utf-8", "replace").strip()
        return f"docker pull {self.image} first" if "No such image" in said else f"docker: {said.partition(chr(10))[0]}"

    def command(self, root: str, limits: Limits) -> list[str]:
        """`docker run` without network and privileges."""
        memory = f"{limits.memory_mb}m"
        return [
            *(shutil.which("docker") or "docker", "run", "--rm", "--interactive", "--pull", "never"),
            *("--name", Path(root).name, "--network", "none", "--ipc", "none", "--read-only"),
            *("--tmpfs", f"/tmp:size={limits.file_mb}m,mode=1777", "--workdir", "/tmp", "--log-driver", "none"),
            *("--memory", memory, "--memory-swap", memory, "--pids-limit", str(2 * limits.processes)),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", str(secrets.choice(_UIDS))),
            # A container outlives its client; `timeout` ends it where nobody is left to do so.
            *("--entrypoint", "timeout", self.image, "-s", "KILL", str(int(limits.seconds) + 10), *_python("python3")),
        ]

    def kill(self, process: subprocess.Popen[bytes], root: str) -> None:
        """End the container, then its client."""
        subprocess.run(["docker", "kill", Path(root).name], capture_output=True, check=False)
        process.kill()


class Unconfined(Sandbox):
    """No sandbox: a process of the user's own, with limits where the system has them."""

    name = "none"
    guarded = False

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def command(self, root: str, limits: Limits) -> list[str]:
        """Python as it is."""
        return _python(sys.executable)

    def kill(self, process: subprocess.Popen[bytes], root: str) -> None:
        """End a process and its descendants, one by one."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


UNCONFINED = (
    "GENERATED PROGRAMS RUN UNCONFINED (--allow-unconfined-code): they can read and change whatever this user can, and "
    "their verdicts are not to be trusted"
)
SANDBOXES: dict[str, type[Sandbox]] = {s.name: s for s in (Namespaces, Bubblewrap, Docker)}
_ADVICE = (
    "generated programs are not run; use Linux with util-linux and user namespaces, bubblewrap or docker, a task that "
    "runs none, or --allow-unconfined-code where they may do what they like"
)


_choice = ("auto", False)


def choose(name: str = "auto", allow_unconfined: bool = False) -> None:
    """Say how this process confines programs: `namespaces`, `bubblewrap`, `docker`, `docker:IMAGE`, or `auto`, the
    first of these that works here. `allow_unconfined` lets them run unconfined where none does, or by the name `none`.
    Errors: an unknown name, `none` without leave."""
    global _choice  # noqa: PLW0603 - one for a process, like its working folder
    kind = name.partition(":")[0]
    if kind not in ("auto", "none", *SANDBOXES):
        raise unknown("confinement", name, ["auto", "none", *SANDBOXES])
    if kind == "none" and not allow_unconfined:
        raise DllmError("confinement 'none' needs --allow-unconfined-code: generated programs may do what they like")
    _choice = (name, allow_unconfined)


def afresh() -> None:
    """Find out again what works here."""
    _sandbox.cache_clear()


def unconfined_allowed() -> bool:
    """Whether the user has given leave to run programs unconfined."""
    return _choice[1]


def sandbox() -> Sandbox:
    """The chosen sandbox, found out by confining a program. Raises `DllmError` where there is none, with the reason."""
    return _sandbox(*_choice)


@functools.cache
def _sandbox(name: str, allow_unconfined: bool) -> Sandbox:
    kind, _, image = name.partition(":")
    reasons = []
    for cls in SANDBOXES.values() if kind == "auto" else [SANDBOXES[kind]] if kind in SANDBOXES else []:
        tried = Docker(image) if cls is Docker else cls()
        if not (reason := _refusal(tried)):
            return tried
        reasons.append(f"{tried.name}: {reason}")
    if allow_unconfined and kind in ("auto", "none"):
        log.warning("%s", UNCONFINED)
        return Unconfined()
    raise DllmError(f"{'; '.join(reasons)}, so {_ADVICE}")


def refusal() -> str | None:
    """Why programs cannot be confined here, or None."""
    try:
        sandbox()
    except DllmError as error:
        return str(error)
    return None


def _refusal(tried: Sandbox) -> str | None:
    if reason := tried.missing():
        return reason
    verdict = run("x = 1", "assert x == 1", Limits(seconds=20), within=tried)
    if verdict.passed:
        return None
    return f"this system does not let a process be confined ({last_line(verdict)})"


def last_line(verdict: Verdict) -> str:
    """What a failed program said last."""
    return (verdict.output.strip() or verdict.status).rpartition("\n")[2]


# ---------------------------------------------------------------------------------------------------------------- a run


def run(
    program: str,
    check: str = "",
    limits: Limits = Limits(),
    *,
    context: str = "",
    entries: Sequence[str] = (),
    within: Sandbox | None = None,
) -> Verdict:
    """Execute `program`, then `check` against it, each confined by itself.

    check     passes when it runs to its end and has asked the program something. Names that it does not define are
              the program's; only plain values cross
    context   trusted code before the check, such as the head of the function that was asked for: its helpers stay
              the benchmark's own whatever the program calls so
    entries   names that are the program's although Python or the context knows them too
    within    the sandbox; the first that works here without it. Errors: `DllmError` where there is none
    """
    within = within or sandbox()
    program, check, context = (text.replace("\0", "") for text in (program, check, context))
    start = time.monotonic()
    with _Watch(limits) as watch:
        answering = watch.start(within, {"program": program})
        asking = watch.start(within, {"check": check, "context": context, "entries": list(entries)}) if check else None
        passed = answering.hear() == b'"ready"\n'
        if passed and asking is not None:
            passed = _exchange(asking, answering, watch)
    text = (answering.said + (asking.said if asking else b""))[-_TAIL:].decode("utf-8", "replace")
    if watch.reason and not passed:
        text += f"\n{watch.reason}"
    status = "passed" if passed else "timeout" if watch.timed_out else "failed"
    return Verdict(status, text[-_TAIL:], time.monotonic() - start, within.name != Unconfined.name)


def _exchange(asking: _Side, answering: _Side, watch: _Watch) -> bool:
    """Carry questions and answers, unread, until the check says that it has passed or either is gone. A check that has
    asked nothing says nothing of the program."""
    asked = False
    while (message := asking.hear()) is not None:
        if message == b'"passed"\n':
            watch.reason = "" if asked else "the check asked the program nothing"
            return asked
        asked = True
        answering.tell(message)
        if (answer := answering.hear()) is None:
            asking.close()  # then the check says so and ends
        else:
            asking.tell(answer)
    return False


class _Side:
    """One sandboxed process and this end of its pipes."""

    def __init__(self, within: Sandbox, limits: Limits):
        self.within, self.limits = within, limits
        # Stays empty outside: what the program writes is in its own mount namespace.
        self.root = tempfile.mkdtemp(prefix="dllm-confined-")
        try:
            self.process = subprocess.Popen(
                within.command(self.root, limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**_environment(within), "PATH": _PATH, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                start_new_session=True,
                cwd=self.root if within.name == "none" else None if within.name == "docker" else "/",
            )
        except OSError as error:
            shutil.rmtree(self.root, ignore_errors=True)
            raise DllmError(f"cannot start a process for a generated program: {error}") from None
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._into, self._out, self._errors = self.process.stdin, self.process.stdout, self.process.stderr
        self.said = b""  # the end of what it printed
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Keep the end of what is printed, and stop listening to one that prints without end."""
        total = 0
        with self._errors as pipe:
            while total <= self.limits.file_mb << 20 and (part := os.read(pipe.fileno(), 1 << 16)):
                total += len(part)
                self.said = (self.said + part)[-_TAIL:]

    def tell(self, line: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended, which `hear` will tell
            self._into.write(line)
            self._into.flush()

    def hear(self) -> bytes | None:
        """The next line; None where there is none, or one that is too long."""
        line = self._out.readline(_LONGEST)
        return line if line.endswith(b"\n") else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._into.close()

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        import psutil

        total = 0
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            for process in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def kill(self) -> None:
        if self.process.poll() is None:
            self.within.kill(self.process, self.root)

    def end(self) -> None:
        self.kill()
        self.process.wait()
        self.close()
        self._reader.join(timeout=2)
        self._out.close()
        shutil.rmtree(self.root, ignore_errors=True)


class _Watch:
    """Starts the sides of one run, ends them when their time or memory is used up, and leaves none behind."""

    def __init__(self, limits: Limits):
        self.limits, self.reason, self.timed_out = limits, "", False
        self._sides: list[_Side] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:  # also when this process is interrupted
        self._over.set()
        self._thread.join()
        for side in self._sides:
            side.end()

    def start(self, within: Sandbox, header: Mapping[str, object]) -> _Side:
        side = _Side(within, self.limits)
        self._sides.append(side)
        side.tell(json.dumps({**header, "limits": self.limits.plain(), "guard": within.guarded}).encode() + b"\n")
        return side

    def _look(self) -> None:
        end = time.monotonic() + self.limits.seconds
        while not self._over.wait(0.1 if self._spent else min(0.1, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                self.timed_out = not self.reason
            elif any(side.memory() > self.limits.memory_mb << 20 for side in list(self._sides)):
                self.reason = f"MemoryError: more than {self.limits.memory_mb} MB"
            if self._spent:
                for side in list(self._sides):
                    side.kill()

    @property
    def _spent(self) -> bool:
        return self.timed_out or bool(self.reason)


def _environment(within: Sandbox) -> dict[str, str]:
    """What a client of docker needs to find its daemon, and Windows its own libraries; nothing for a program."""
    names = {"docker": ("HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "XDG_RUNTIME_DIR")}
    kept = names.get(within.name, ("SYSTEMROOT",) if sys.platform == "win32" else ())
    return {name: os.environ[name] for name in kept if name in os.environ}


def _drop() -> list[str]:
    """What `setpriv` takes away."""
    user = str(secrets.choice(_UIDS))
    other = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.geteuid() == 0 else []
    return ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *other]


def _python(interpreter: str) -> list[str]:
    return [interpreter, "-I", "-S", "-B", "-c", _DRIVER]


def sys_python() -> str:
    """The interpreter behind a virtual environment: it needs one folder besides the system's libraries."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())  # foreign


def _folders() -> list[str]:
    """What the program may read: the system's libraries and tools, and Python's own folder."""
    system = filter(os.path.exists, ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32"))
    base = [str(Path(p).resolve()) for p in (sys.base_prefix, sysconfig.get_paths()["stdlib"])]
    found = dict.fromkeys([*system, *base])
    return [p for p in found if not any(p != other and Path(p).is_relative_to(other) for other in found)]
