"""Mutation testing: how many small edits of the library do its tests notice?

    python tests/mutation/run.py                           a draw of 300 over all areas of areas.toml
    python tests/mutation/run.py --area engine --n 300     those of the same draw that lie in one area
    python tests/mutation/run.py --report                  the table and the survivors' diffs, without running anything

Works on a copy of a commit (`--rev`, default HEAD), never on the working tree. Every answer is written down at once: a
run that was killed goes on where it stopped. At a later commit mutants that were killed stay killed as long as the
function around them is the same; survivors meet the tests of that commit (`--fresh` forgets everything).

A first pass runs an area's tests with coverage. A mutant then meets only the tests that run its lines, quick ones
first and each test function once before its other parameters, until one fails or `--budget` seconds of tests are spent.
Tests run in forks of a process that has imported torch already. A mutant under which a test takes many times its
processor time has hung: it counts as killed.

Needs the extra [mutation]: pip install -e ".[mutation]".
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from mutants import Mutant, Scopes, drawn, files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTUP, PATIENCE = 10.0, 4.0  # a mutant has hung when a test takes so many seconds and times its own processor time
MEMORY = 16 << 30  # bytes of address space


class Recorder:
    """A pytest plugin: keeps the chosen tests (with their seconds) in their order, and notes what failed first."""

    def __init__(self, order: dict[str, float], out: Path) -> None:
        self.seconds, self.out = order, out

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        place = {name: i for i, name in enumerate(self.seconds)}
        items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])

    def pytest_runtest_protocol(self, item: Any) -> None:
        """A test that takes far longer than it should ends the process."""
        signal.setitimer(signal.ITIMER_PROF, STARTUP + PATIENCE * self.seconds[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.out.exists():
            self.out.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.out.exists():
            self.out.write_text("import")


class Tracer:
    """A pytest plugin: which lines of the area each test runs, and how long it takes."""

    def __init__(self, tree: Path, sources: list[Path], out: Path) -> None:
        import coverage

        self.tree, self.out = tree, out
        self.cov = coverage.Coverage(data_file=None, include=[str(p) for p in sources], config_file=False)
        self.times: dict[str, float] = {}  # processor time, which a busy machine does not stretch
        self.fixtures: dict[str, list[str]] = {}
        self.failed: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self.cov.start()  # before the modules are imported: what runs then has the context ''

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.cov.switch_context(item.nodeid)
        self.fixtures[item.nodeid] = list(item.fixturenames)
        self.times[item.nodeid] = -time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.times[nodeid] += time.process_time()

    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
        if fixturedef.scope != "function":  # belongs to every test that uses it, not only to the first
            self.cov.switch_context(f"fixture {fixturedef.baseid} {fixturedef.argname}")

    def pytest_runtest_call(self, item: Any) -> None:
        self.cov.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.cov.stop()
        data, lines = self.cov.get_data(), {}
        names = sorted(set(self.times) - self.failed)
        number = {name: i for i, name in enumerate(names)}
        users: dict[str, list[int]] = {}
        for test in names:
            for fixture in self.fixtures[test]:
                users.setdefault(fixture, []).append(number[test])
        for file in data.measured_files():
            table = lines[Path(file).relative_to(self.tree).as_posix()] = {}
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {number[c] for c in contexts if c in number}
                for c in contexts:
                    if c.startswith("fixture "):
                        tests |= set(users.get(c.split()[-1], ()))
                table[line] = sorted(tests)
        modules = sorted(
            name
            for name, module in sys.modules.items()
            if (file := getattr(module, "__file__", None)) and "packages" in file and "__editable__" not in name
        )
        self.out.write_text(
            json.dumps({"status": int(exitstatus), "tests": names, "times": self.times, "lines": lines,
                        "modules": modules, "failed": sorted(self.failed)})
        )  # fmt: skip


def forked(tree: Path, args: list[str], plugins: list[Any], limit: float, log: Path) -> int:
    """pytest in a fork of this process, in `tree`; its exit status, negative for a signal."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.setsid()
            if limit:
                resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))  # an import may hang, too
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.chdir(tree)
            sys.path[:] = [str(tree), *(p for p in sys.path if p != str(HERE))]
            os.environ["PYTHONPATH"] = str(tree)
            if limit:  # without a mutant the compiled files are kept for the others
                sys.dont_write_bytecode = True
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            import pytest

            status = int(pytest.main(args, plugins=plugins))
        finally:
            sys.stdout.flush()
            os._exit(status)
    ends = time.monotonic() + 20 * limit if limit else float("inf")
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


class Room:
    """Areas that the same tests judge: their copy of the tree, and which test runs which line."""

    def __init__(self, name: str, spec: dict[str, Any], folder: Path, commit: str) -> None:
        self.name, self.spec, self.commit = name, spec, commit
        self.folder, self.tree = folder / name, folder / name / "tree"
        self.log = self.folder / "pytest.log"

    def prepare(self) -> None:
        """Copy the commit, unless it is there already, and learn which test runs which line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.folder / "commit"
        if not stamp.exists() or stamp.read_text() != self.commit:
            shutil.rmtree(self.tree, ignore_errors=True)
            copy(self.commit, self.tree)
            (self.folder / "coverage.json").unlink(missing_ok=True)
            stamp.write_text(self.commit)
        out = self.folder / "coverage.json"
        if not out.exists():
            print(f"{self.name}: running its tests with coverage", flush=True)
            sources = [p for patterns in self.spec["areas"].values() for p in files(self.tree, patterns)]
            args = [*self.files(), "-q", "-p", "no:cacheprovider", "-k", self.spec.get("select", "")]
            forked(self.tree, args, [Tracer(self.tree, sources, out)], 0, self.log)
            if not out.exists() or json.loads(out.read_text())["status"] not in (0, 1):
                out.unlink(missing_ok=True)
                raise SystemExit(f"{self.name}: its tests do not run, see {self.log}")
        found = json.loads(out.read_text())
        for test in found["failed"]:
            print(f"{self.name}: left out, for it fails without a mutant: {test}", flush=True)
        self.tests, self.times, self.lines = found["tests"], found["times"], found["lines"]
        for module in ["hypothesis", "hypothesis.strategies", *found["modules"]]:
            with warnings.catch_warnings(), contextlib.suppress(Exception):  # only saves the forks their time
                warnings.simplefilter("ignore")
                import_module(module)
        gc.freeze()  # else every fork walks through what the preloaded modules hold

    def files(self) -> list[str]:
        found = {p.relative_to(self.tree).as_posix() for t in self.spec["tests"] for p in self.tree.glob(f"tests/{t}")}
        return sorted(found)

    def choose(self, mutant: Mutant, budget: float) -> tuple[list[str], bool]:
        """The tests that run the mutant's lines, in the order in which to try them, and whether the budget cut them."""
        lines = self.lines.get(mutant.path, {})
        scopes = Scopes((self.tree / mutant.path).read_text())
        first, last = scopes.statement(mutant.line)
        numbers = {t for line in range(first, last + 1) for t in lines.get(str(line), ())}
        if scopes.at_import(mutant.line):
            numbers = {t for tests in lines.values() for t in tests} or set(range(len(self.tests)))
        always = {i for i, test in enumerate(self.tests) if any(name in test for name in self.spec.get("always", []))}
        ahead = {self.tests[i] for i in always} if scopes.at_import(mutant.line) else set()
        numbers |= always
        turn: Counter[str] = Counter()
        ranked = []
        for test in sorted((self.tests[i] for i in numbers), key=lambda t: self.times[t]):
            function = test.partition("[")[0]
            ranked.append((-1 if test in ahead else min(turn[function], 3), self.times[test], test))
            turn[function] += 1
        chosen = [test for _, _, test in sorted(ranked)]
        within = list(
            itertools.takewhile(lambda total: total <= budget, itertools.accumulate(map(self.times.get, chosen)))
        )
        return chosen[: len(within)], len(within) < len(chosen)

    def judge(self, mutant: Mutant, budget: float) -> dict[str, Any]:
        """Run the tests against one mutant."""
        order, cut = self.choose(mutant, budget)
        file, began = self.tree / mutant.path, time.monotonic()
        answer = {"identity": mutant.identity, "area": mutant.area, "path": mutant.path, "line": mutant.line,
                  "scope": mutant.scope, "operator": mutant.operator, "commit": self.commit,
                  "diff": mutant.diff(self.tree), "tests": len(order), "cut": cut}  # fmt: skip
        if not order:
            return answer | {"outcome": "survived", "by": "", "seconds": 0.0}
        original, stat, failed = file.read_text(), file.stat(), self.folder / "failed"
        failed.unlink(missing_ok=True)
        args = [*sorted({test.partition("::")[0] for test in order}), "-x", "-q", "-p", "no:cacheprovider"]
        limit = 6 * STARTUP + PATIENCE * sum(self.times[t] for t in order)
        try:
            file.write_text(mutant.source)
            status = forked(self.tree, args, [Recorder({t: self.times[t] for t in order}, failed)], limit, self.log)
        finally:
            file.write_text(original)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        hung = status in (-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGKILL)
        outcome = "survived" if status == 0 else "timeout" if hung else "killed"
        by = failed.read_text() if failed.exists() else "" if outcome == "survived" else f"status {status}"
        return answer | {"outcome": outcome, "by": by, "seconds": round(time.monotonic() - began, 2)}


def copy(commit: str, tree: Path) -> None:
    """The files of a commit, laid out so that the one folder on the path holds the whole package."""
    parts = tree.with_name(f"{tree.name}.{os.getpid()}")  # another run may want the same copy
    parts.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(parts)], input=archive, check=True)
    for name in ("samplers", "eval"):
        (parts / "dllm" / name).symlink_to(Path("..") / name)
    try:
        parts.rename(tree)
    except OSError:  # it was quicker
        shutil.rmtree(parts)


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """The last answer to every mutant."""
    out = {}
    for file in sorted(folder.glob("*/answers.jsonl")):
        for line in file.read_text().splitlines():
            answer = json.loads(line)
            out[answer["identity"]] = answer
    return out


def report(mutants: list[Mutant], known: dict[str, dict[str, Any]]) -> str:
    """The table, and what survived."""
    rows: dict[str, Counter[str]] = {}
    for m in mutants:
        row, answer = rows.setdefault(m.area, Counter()), known.get(m.identity)
        row["drawn"] += 1
        row[answer["outcome"] if answer else "open"] += 1
    rows["all"] = sum(rows.values(), Counter())
    out = ["| area | drawn | killed | timeout | survived | open |", "|---|---|---|---|---|---|"]
    for area, row in rows.items():
        out.append(
            f"| {area} | " + " | ".join(str(row[k]) for k in ("drawn", "killed", "timeout", "survived", "open")) + " |"
        )
    done = rows["all"]["drawn"] - rows["all"]["open"]
    dead = rows["all"]["killed"] + rows["all"]["timeout"]
    out.append(f"\n{dead} of {done} noticed ({100 * dead / max(done, 1):.1f} %)\n")
    for m in mutants:
        answer = known.get(m.identity)
        if answer and answer["outcome"] == "survived":
            more = ", more beyond the budget" if answer["cut"] else ""
            out += [f"--- {m.identity} {m.path}:{m.line} {m.scope} {m.operator} ({answer['tests']} tests{more})",
                    *answer["diff"].splitlines()[2:], ""]  # fmt: skip
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=300, help="mutants of the draw, over all areas")
    parser.add_argument("--area", action="append", help="run only this area's part of the draw (may be repeated)")
    parser.add_argument("--rev", default="HEAD", help="the commit whose files are copied")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutation")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of tests that a mutant may meet")
    parser.add_argument("--fresh", action="store_true", help="forget all answers")
    parser.add_argument("--report", action="store_true", help="print what is known and stop")
    options = parser.parse_args()
    rooms = tomllib.loads((HERE / "areas.toml").read_text())
    areas = {area: sources for spec in rooms.values() for area, sources in spec["areas"].items()}
    if unknown := set(options.area or ()) - set(areas):
        parser.error(f"no area {', '.join(sorted(unknown))}; there are {', '.join(areas)}")
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    rev = ["git", "-C", str(ROOT), "rev-parse", options.rev]
    commit = subprocess.run(rev, check=True, capture_output=True, text=True).stdout.strip()
    source = options.out / "sources" / commit
    if not source.exists():
        copy(commit, source)
    mutants = list(itertools.islice(drawn(source, areas, options.seed), options.n))
    if not options.report:
        wanted = options.area or list(areas)
        for name, spec in rooms.items():
            mine = [m for m in mutants if m.area in wanted and m.area in spec["areas"]]
            campaign(Room(name, spec, options.out, commit), mine, options)
    print(report(mutants, answers(options.out)))


def campaign(room: Room, mutants: list[Mutant], options: argparse.Namespace) -> None:
    """Answer those mutants that have no answer yet, or survived the tests of another commit."""
    known = answers(options.out)

    def settled(m: Mutant) -> bool:
        answer = known.get(m.identity)
        return answer is not None and (answer["outcome"] != "survived" or answer["commit"] == room.commit)

    todo = [m for m in mutants if not settled(m)]
    if not todo:
        return
    room.prepare()
    with (room.folder / "answers.jsonl").open("a") as file:
        for i, mutant in enumerate(todo):
            answer = room.judge(mutant, options.budget)
            file.write(json.dumps(answer) + "\n")
            file.flush()
            print(f"{room.name} {i + 1}/{len(todo)} {mutant.path}:{mutant.line} {mutant.operator}: {answer['outcome']} "
                  f"{answer['seconds']:.1f} s {answer['by']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
