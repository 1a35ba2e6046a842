"""Generated programs that write outside, open sockets, fork without end or sleep for ever leave nothing behind."""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dllm.errors import DllmError
from dllm.eval import run as run_evaluation
from dllm.eval.tasks import boundary, confined
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


F = "def f(x): return 0\n"
ALWAYS = """
class Always:
    __eq__ = __contains__ = __bool__ = lambda self, *other: True
    __ne__ = lambda self, other: False
    __sub__ = __rsub__ = __abs__ = __round__ = lambda self, *other: 0
    __hash__ = lambda self: 0
    __iter__ = lambda self: iter(())
    def __getattr__(self, name): return Always()
    def __call__(self, *arguments): return Always()
def f(x): return Always()
"""
WRITES = """
import os
for number in range(3, 64):
    for message in (b'"ready"\\n', b'"passed"\\n', b'{"value": 4}\\n'):
        try: os.write(number, message)
        except OSError: pass
"""
FORGED = {  # a program, and a check that it does not deserve to pass
    "the old token": (
        "import __main__, os, sys\ntext = str(vars(__main__))\nsys.stdout.write(text)\nsys.stdout.flush()\nos._exit(0)",
        "assert False",
    ),
    "messages on every descriptor": (WRITES + "os._exit(0)", "assert f(2) == 4"),
    "messages, then an answer": (WRITES + F, "assert f(2) == 5"),
    "leaving within a call": ("import os\ndef f(x): os._exit(0)", "try:\n f(2)\nexcept BaseException: pass"),
    "leaving politely": ("import sys\ndef f(x): sys.exit(0)", "assert f(2) == 4"),
    "at exit": ("import atexit, os\natexit.register(os._exit, 0)\n" + F, "assert f(2) == 4"),
    "equal to everything": (ALWAYS, "assert f(2) == 4"),
    "nearly everything": (ALWAYS, "assert abs(f(2) - 4) < 1e-6"),
    "unequal to nothing": (ALWAYS, "assert not f(2) != 4"),
    "holds everything": (ALWAYS, "assert 4 in f(2)"),
    "is everything": (ALWAYS, "assert isinstance(f(2), int)"),
    "in every set": (ALWAYS, "assert f(2) in {4, 5}"),
    "a text equal to all": ("class T(str):\n __eq__ = lambda *a: True\ndef f(x): return T()", "assert f(2) == 'x'"),
    "a tuple equal to all": ("class T(tuple):\n __eq__ = lambda *a: True\ndef f(x): return T()", "assert f(2) == (4,)"),
    "builtins of its own": ("import builtins\nbuiltins.abs = abs = lambda x: 0\n" + F, "assert abs(f(2) - 4) < 1"),
    "a module of its own": (
        "import math, sys\nmath.isclose = lambda *a: True\nclass math: isclose = lambda *a: True\n"
        "sys.modules['math'] = math\n" + F,
        "import math\nassert math.isclose(f(2), 4)",
    ),
    "a module's function": ("import math\nmath.isclose = lambda *a: True\n" + F, "assert math.isclose(f(2), 4)"),
    "no assertion error": ("import builtins\nbuiltins.AssertionError = SystemExit\n" + F, "assert f(2) == 4"),
    "a helper of its own": ("def poly(x): return 4\n" + F, "assert poly(f(2)) == 4"),
    "stopping the loop": ("def f(x): raise StopIteration", "assert all(map(lambda y: f(y) == 4, [2]))"),
    "changing its argument": ("def f(x):\n x.clear()\n return []", "x = [2, 1]\nassert f(x) == sorted(x)"),
    "a trace function": ("import sys\nsys.settrace(lambda *a: None)\nsys.exit = print\n" + F, "assert f(2) == 4"),
    "a check that asks nothing": (F, "def check(candidate):\n assert candidate(2) == 4"),
    "changing its argument behind its answer": (
        "import sys\ndef answer(self, asked):\n"
        " if asked['do'] == 'name': return {'value': {'object': 0, 'shown': ''}}\n"
        " return {'value': [], 'after': {'arguments': [[]], 'named': {}}}\n"
        "sys.modules['__main__'].Program.answer = answer",
        "x = [2, 1]\nassert f(x) == sorted(x)",
    ),
    "changing it before a print": (
        "def f(x):\n x.clear()\n return []",
        "x = [2]\nr = f(x)\nprint(r)\nassert r == sorted(x)",
    ),
    "forgiving": (
        "class f:\n def __init__(self, x): pass\n def __enter__(self): return 0\n def __exit__(self, *a): return True",
        "with f(2) as y:\n assert y == 4",
    ),
    "a hash like another's": (
        ALWAYS.replace("self: 0\n    __iter__", "self: 4\n    __iter__"),
        "assert f(2) in {4, 5}",
    ),
    "between everything": ("class I:\n __lt__ = __gt__ = lambda *a: True\ndef f(x): return I()", "assert 3 < f(2) < 5"),
}
UNNAMED = {  # the same, where nobody says which names are the program's
    "a class called math": ("class math: isclose = lambda *a: True\n" + F, "assert math.isclose(f(2), 4)"),
    "another module called math": ("import operator as math\n" + F, "assert math.floor(f(2)) == 4"),
    "nothing of the name": ("x = 1", "assert sum([10, 15]) == 25"),
    "a tool of the check's": ("def abs(x): return 0", "assert abs(max([1, 2]) - 7) < 1"),
    "a lenient exception": (
        "class E(StopIteration): pass\ndef f(x): raise E",
        "assert all(map(lambda y: f(y) == 4, [2]))",
    ),
}


@can
@pytest.mark.parametrize("name", UNNAMED)
def test_nor_where_the_check_alone_says_what_is_asked(name):
    assert not run(*UNNAMED[name]).passed


@can
@pytest.mark.parametrize("name", FORGED)
def test_a_program_cannot_make_its_verdict(name):
    program, check = FORGED[name]
    assert not run(program, check, context="def poly(x): return x\ndef f(x): pass", entries=["f"]).passed


@can
def test_a_program_cannot_see_its_check():
    program = """
import gc, os, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [repr(frame.f_globals), repr(frame.f_locals)]
        frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))][:20000]
    seen += sys.argv + [repr(os.environ), repr(os.listdir("/tmp"))]
    return any("".join(("zebra", "fish")) in text for text in seen)
"""
    assert run(program, "zebrafish = f(1)\nassert zebrafish is False").passed


FAIR = {  # right programs of every kind that checks ask for
    "numbers and texts": ("def f(x): return [x, 2.5, 1j, 'é\\u2028', b'x', None, True]",
                          "assert f(10**5000) == [10**5000, 2.5, 1j, 'é\\u2028', b'x', None, True]"),
    "containers": ("def f(x): return {(1, 2): {3}, 'k': [frozenset(x)]}",
                   "assert f({4, 5}) == {(1, 2): {3}, 'k': [frozenset({4, 5})]}"),
    "counters": ("from collections import Counter, OrderedDict, defaultdict\n"
                 "def f(x): return [Counter(x), OrderedDict(a=1), defaultdict(int, a=1)]",
                 "assert f('aab') == [{'a': 2, 'b': 1}, {'a': 1}, {'a': 1}]"),
    "named tuples": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return [P(x, 2)]",
                     "assert f(1) == [(1, 2)] and f(1)[0].y == 2"),
    "generators": ("def f(n):\n for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and sum(f(3)) == 3"),
    "in place": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "exceptions": ("def f(x): raise ValueError('no')",
                   "try:\n f(1)\n assert False\nexcept ValueError as e:\n assert str(e) == 'no'"),
    "classes": ("class A:\n def __init__(self): self.x = []\n def push(self, v): self.x.append(v)\n"
                " def __eq__(self, other): return self.x == other.x\n def __len__(self): return len(self.x)",
                "a, b = A(), A()\na.push(3)\nb.push(3)\nassert a == b and a.x == [3] and len(a) == 1"),
    "objects back": ("class N:\n def __init__(self, v): self.v, self.left = v, None\ndef f(n): return n.v + n.left.v",
                     "r = N(1)\nr.left = N(3)\nassert f(r) == 4"),
    "functions across": ("def g(x): return x + 1\ndef f(h, key): return [h(3), sorted('ba', key=key)]",
                         "assert f(lambda v: 2 * g(v), ord) == [8, ['a', 'b']]"),
    "a function of functions": ("def f(g): return lambda x: g(g(x))", "assert f(lambda v: 2 * v)(3) == 12"),
    "a name of Python's": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "its import": ("import math\ndef f(x): return x / 3", "assert math.isclose(f(1), 0.3333333333333)"),
    "a constant": ("answer = 42", "assert answer == 42"),
    "dates": ("import datetime\ndef f(d): return datetime.date(2020, 1, d)",
              "import datetime\nassert f(2) == datetime.date(2020, 1, 2)"),
    "threads and children": ("import subprocess, sys, threading\ndef f(x):\n t = threading.Thread(target=int)\n"
                             " t.start()\n t.join()\n return subprocess.run([sys.executable, '-c', '1']).returncode",
                             "assert f(1) == 0"),
    "exceptions of its own": (
        "class E(ValueError): pass\nclass D(E): pass\ndef f(x): raise D('no', 2)",
        "for kind in (E, D, ValueError):\n try:\n  f(1)\n  assert 0\n except kind as e: assert e.args == ('no', 2)\n"
        "try: f(1)\nexcept KeyError: assert False\nexcept Exception: pass"),
    "exceptions of many arguments": (
        "import json\ndef f(x): return x.decode('ascii')\ndef g(x): return json.loads(x)\n"
        "def h(x): raise SystemExit(3)\ndef k(x): return {}[x]",
        "for call, kind, given in [(f, UnicodeDecodeError, b'\\xff'), (g, ValueError, '{'), (h, SystemExit, 1), "
        "(k, KeyError, 'a')]:\n try:\n  call(given)\n  assert False\n except kind as e: said = str(e)\n"
        "assert said == repr('a')"),
    "in place and returned": ("def f(x):\n x.sort()\n return x", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "in place by name": ("def f(x, y=1): x.append(y)", "x = [1]\nf(x=x, y=2)\nassert x == [1, 2]"),
    "methods of counters": (
        "from collections import Counter, defaultdict\ndef f(x): return Counter(x)\ndef g(): return defaultdict(list)",
        "assert f('aab').most_common(1) == [('a', 2)] and f('a')['z'] == 0\n"
        "assert f(f('aa')) == {'a': 2} and g()[7] == []"),
    "operators": (
        "import dataclasses\n@dataclasses.dataclass(frozen=True, order=True)\nclass V:\n x: int\n"
        " def __add__(self, o): return V(self.x + o.x)\n def __neg__(self): return V(-self.x)\n"
        " def __reversed__(self): return iter([2, 1])",
        "import copy\nassert V(1) + V(2) == V(3) and V(1) < V(2) and -V(1) == V(-1) and V(1) != None\n"
        "assert min(V(3), V(2)).x == 2 and len({V(1), V(1), V(2)}) == 2 and list(reversed(V(1))) == [2, 1]\n"
        "assert issubclass(V, V) and copy.deepcopy(V(1)) == V(1)"),
    "contexts": ("import contextlib\n@contextlib.contextmanager\ndef f(x): yield x + 1",
                 "with f(1) as y:\n assert y == 2"),
    "coroutines": ("import asyncio\nasync def f(x):\n await asyncio.sleep(0)\n return x + 1",
                   "import asyncio\nassert asyncio.run(f(1)) == 2\nasync def t(): return await f(2)\n"
                   "assert asyncio.run(t()) == 3"),
    "keywords of any name": ("def f(self, do, kind, name): return self + do + kind + name",
                             "assert f(self=1, do=1, kind=1, name=1) == 4"),
    "slices": ("class R:\n def __getitem__(self, i): return [1, 2, 3][i]\n def __delitem__(self, i): self.gone = i",
               "r = R()\nassert r[1:] == [2, 3]\ndel r[2]\nassert r.gone == 2"),
    "iterators in": ("def f(x): return [*x]",
                     "assert f(iter('ab')) == ['a', 'b'] and f(i for i in range(3)) == [0, 1, 2]\n"
                     "assert f({1: 2}.keys()) == [1]"),
    "decorators": ("import functools\ndef f(g):\n @functools.wraps(g)\n def h(*a): return g(*a) + 1\n return h",
                   "@f\ndef k(x): return x\nassert k(1) == 2 and k.__name__ == 'k'"),
    "tuples with names": ("from typing import NamedTuple\nclass P(NamedTuple):\n x: int",
                          "assert isinstance(P(1), tuple) and P(1) < (2,) and sorted([P(2), P(1)]) == [(1,), (2,)]"),
    "time zones": ("from datetime import datetime, timezone\ndef f(x): return datetime.fromtimestamp(x, timezone.utc)",
                   "from datetime import datetime, timezone\nassert f(0) == datetime(1970, 1, 1, tzinfo=timezone.utc)"),
}  # fmt: skip


@can
@pytest.mark.parametrize("name", FAIR)
def test_a_right_program_passes_its_check(name):
    verdict = run(*FAIR[name], limits=Limits(seconds=20))
    assert verdict.passed, verdict.output


@can
def test_memory_beside_the_address_space_is_closed():
    """System V and POSIX shared memory, anonymous files, and the mounts of a namespace of one's own."""
    numbers = {
        name: boundary.DENIED[name] for name in ("shmget", "msgget", "memfd_create", "unshare", "mount", "keyctl")
    }
    column = boundary.ARCHITECTURES[platform.machine()][1]
    program = f"""
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def f(number): return [libc.syscall(number, 0, 1 << 20, 0o1600, 0), ctypes.get_errno()]
def user_namespace(): return libc.syscall({boundary.CLONE[column]}, 0x10000011, 0, 0, 0, 0)
def host(): return socket.socket(40, socket.SOCK_STREAM)
"""
    check = "\n".join(f"assert f({n[column]}) == [-1, 1], {name!r}" for name, n in numbers.items())
    check += "\nassert user_namespace() == -1\ntry:\n host()\n assert False\nexcept OSError: pass"
    verdict = run(program, check)
    assert verdict.passed, verdict.output


@can
def test_the_callers_keys_are_out_of_reach():
    """A key in the caller's session is neither read nor revoked."""
    column = boundary.ARCHITECTURES[platform.machine()][1]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    key = libc.syscall(boundary.DENIED["add_key"][column], b"user", secrets.token_hex(8).encode(), b"mine", 4, -3)
    if key < 0:
        pytest.skip("no session keyring here")
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(): return [libc.syscall({boundary.KEYCTL[column]}, order, {key}, 0, 0, 0) for order in (3, 11, 6)]
"""
    assert run(program, "assert f() == [-1, -1, -1]").passed
    content = ctypes.create_string_buffer(8)
    assert libc.syscall(boundary.KEYCTL[column], 11, key, content, 8, 0) == 4 and content.value == b"mine"
    libc.syscall(boundary.KEYCTL[column], 3, key)


@can
def test_memory_is_bounded_over_all_processes():
    program = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        block = bytearray(200 << 20)
        for i in range(0, len(block), 4096): block[i] = 1
        time.sleep(100)
time.sleep(100)
"""
    verdict = run(program, limits=Limits(seconds=20))
    assert verdict.status == "failed" and "more than 512 MB" in verdict.output


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
    mark = f"mark{secrets.token_hex(8)}"
    forks = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {forks!r}, {mark!r}])"
    assert run(program, limits=Limits(seconds=1.5)).status == "timeout"
    assert gone(mark)


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
    child = (  # the mark is put together there: no other command line holds it
        f"import subprocess, sys\nmark = ''.join(['mark', '{mark[4:]}'])\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)', mark])"
    )
    body = f"from dllm.eval.tasks.confined import Limits, run\nrun({child!r}, limits=Limits(seconds=90))"
    parent = subprocess.Popen([sys.executable, "-c", body])
    try:
        end = time.monotonic() + 30
        while not processes(mark) and time.monotonic() < end:
            time.sleep(0.05)
        assert processes(mark)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(mark)


def test_where_namespaces_work_nothing_is_refused():
    tools = confined.Namespaces().missing() is None
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    probe = ["unshare", *user, "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    works = tools and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    assert not works or confined.refusal() is None, confined.refusal()


@pytest.fixture
def afresh(monkeypatch):
    """Whether programs can be confined is found out again, and the choice is taken back."""
    confined.afresh()
    yield monkeypatch
    monkeypatch.undo()
    confined.choose()
    confined.afresh()


def test_where_it_cannot_be_confined_it_is_refused(afresh):
    absent = ("unshare", "bwrap", "docker")
    afresh.setattr(shutil, "which", lambda tool, **_: None if tool in absent else "/usr/bin/" + tool)
    with pytest.raises(DllmError, match=r"unshare not found.*bwrap not found.*docker not found.*programs are not run"):
        run("raise SystemExit(1)")


def test_a_sandbox_that_fails_is_a_refusal(afresh):
    afresh.setattr(confined, "_ENTER", "echo no namespaces for you >&2; exit 1")
    afresh.setenv("PATH", "/nowhere")
    assert "no namespaces for you" in (confined.refusal() or "")


def test_unconfined_only_by_leave_and_said_aloud(afresh, caplog):
    with pytest.raises(DllmError, match="needs --allow-unconfined-code"):
        confined.choose("none")
    with pytest.raises(DllmError, match="unknown confinement 'dcker'; did you mean 'docker'"):
        confined.choose("dcker")
    confined.choose("none", allow_unconfined=True)
    assert run("def f(x): return x + 1", "assert f(1) == 2").passed and "UNCONFINED" in caplog.text
    assert not run("import os\ndef f(x): os._exit(0)", "assert f(1) == 2").passed
    assert run("import time\ntime.sleep(60)", limits=Limits(seconds=1)).status == "timeout"
    assert run("x = bytearray(10**10)").status == "failed"
    if can.args[0] is False:  # leave is no wish: programs are confined where they can be
        confined.choose("auto", allow_unconfined=True)
        assert confined.sandbox().name != "none"


def test_docker_is_asked_for_its_image(afresh, tmp_path):
    """Without a daemon: what the client says, and what it is asked to run."""
    client = tmp_path / "docker"
    client.write_text("#!/bin/sh\necho 'Error: No such image: x' >&2\nexit 1\n")
    client.chmod(0o755)
    afresh.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    confined.choose("docker:python:3.12-slim")
    assert "docker pull python:3.12-slim first" in (confined.refusal() or "")
    # A client that runs the container's command here: messages pass through it as through the real one.
    client.write_text(
        '#!/bin/sh\n[ "$1" = run ] || exit 0\necho "$@" | head -c 700 > ' + str(tmp_path / "asked") + "\n"
        'while [ "$1" != -s ]; do shift; done\nshift 3\nexec "$@"\n'
    )
    confined.afresh()
    assert run("def f(x): return x + 1", "assert f(1) == 2").passed
    asked = (tmp_path / "asked").read_text()
    for word in ("--network none", "--read-only", "--memory 512m", "--cap-drop ALL", "no-new-privileges", "--user "):
        assert word in asked


def test_a_task_that_cannot_run_is_left_out_with_its_reason(afresh, tmp_path):
    """The others go on; by leave it runs, and the report says so before anything else."""
    afresh.setattr(shutil, "which", lambda tool, **_: None)
    asked = {
        "tasks": ["functions", "sudoku"],
        "model": {"name": "tiny", "device": "cpu"},
        "sampler": "threshold",
        "limit": 2,
        "generate": {"max_new_tokens": 32},
    }
    results = run_evaluation(asked, out=tmp_path / "a", progress=False)
    assert [cell["task"] for cell in results.cells] == ["sudoku"]
    (notice,) = results.notices
    assert notice.startswith("functions is left out: it runs generated programs: namespaces: ") and "\n" not in notice
    assert notice in (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(DllmError, match="no task can run here: functions: it runs generated programs"):
        run_evaluation({**asked, "tasks": ["functions"]}, out=tmp_path / "b", progress=False)
    results = run_evaluation(asked, ["allow_unconfined_code=true"], out=tmp_path / "a", progress=False)
    assert {cell["task"] for cell in results.cells} == {"functions", "sudoku"}
    assert results.notices == (f"{confined.UNCONFINED} (2 samples)",)
    report = (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    assert report.index("GENERATED PROGRAMS RUN UNCONFINED") < report.index("## ")
    with pytest.raises(DllmError, match="confinement: confinement 'none' needs --allow-unconfined-code"):
        run_evaluation({**asked, "confinement": "none"}, out=tmp_path / "c", progress=False)
