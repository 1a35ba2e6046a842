"""`dllm eval CONFIG`, `dllm eval compare RUN RUN`, `dllm tune CONFIG`."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup


class _Group(TyperGroup):
    """`dllm eval x.yaml` is `dllm eval run x.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=_Group, no_args_is_help=True, help="Evaluate by a configuration: `dllm eval CONFIG.yaml [--set key=value]`."
)

SETS = typer.Option(
    [], "--set", metavar="KEY=VALUE", help="Override one key, for example sampler.name=credit; may be repeated."
)
UNCONFINED = typer.Option(
    False,
    "--allow-unconfined-code",
    help="Run generated programs even where they cannot be confined: they may then do whatever you may.",
)
LEAVE = ("allow_unconfined_code=true",)
DATA = typer.Option(
    None, "--data", metavar="FOLDER", help="Documents of benchmarks as local files (see `dllm data get`)."
)
OUT = typer.Option(None, "--out", help="The run folder; runs/<name> without it.")


@eval_app.command("run")
def run_command(
    config: Path = typer.Argument(..., help="The YAML file."),
    sets: list[str] = SETS,
    out: Path | None = OUT,
    limit: int | None = typer.Option(None, help="The first documents of each task only."),
    seed: int | None = typer.Option(None, help="Seed of every random choice."),
    data: Path | None = DATA,
    dry_run: bool = typer.Option(
        False, "--dry-run", help="The embedded model and two documents: does the configuration hold together?"
    ),
    retry_errors: bool = typer.Option(False, "--retry-errors", help="Decode again what failed before."),
    unconfined: bool = UNCONFINED,
) -> None:
    """Run an evaluation, or go on with one that was cut short. Exit code 3: some prompts failed."""
    from dllm.eval import run

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sets = [*sets, *LEAVE[:unconfined]]
    results = run(config, sets, out=out, limit=limit, seed=seed, data=data, dry_run=dry_run, retry_errors=retry_errors)
    if not results.lead:  # another rank speaks
        raise typer.Exit(results.exit_code)
    for cell in results.cells:
        accuracy, tpf = 100 * cell["accuracy"], cell.get("tpf")
        speed = f"  {tpf:5.2f} tokens/forward" if tpf is not None and math.isfinite(tpf) else ""
        graded = f"{accuracy:5.1f} %" if math.isfinite(accuracy) else " " * 7
        typer.echo(f"{cell['task']:<16} {cell['setting']:<44} {graded}{speed}")
    for notice in results.notices:
        typer.echo(notice, err=True)
    typer.echo(f"{results.folder / 'report.md'}")
    raise typer.Exit(results.exit_code)


@eval_app.command("compare")
def compare_command(
    first: Path = typer.Argument(..., help="A run folder."),
    second: Path = typer.Argument(..., help="Another."),
    out: Path | None = typer.Option(None, "--out", help="Write the comparison here as markdown as well."),
) -> None:
    """Compare two runs document by document: McNemar, paired bootstrap, and what changed between their
    configurations."""
    from dllm.eval import compare

    text = compare(first, second)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    typer.echo(text)


@eval_app.command("export")
def export_command(
    run: Path = typer.Argument(..., help="A run folder."),
    to: Path = typer.Option(..., "--to", help="The folder for the files, one a setting."),
) -> None:
    """Answers of a drafting run in the format of Spec-Bench, one file a setting, for its own scripts."""
    from dllm.eval.specbench import export

    for path in export(run, to):
        typer.echo(path)


def tune(
    config: Path = typer.Argument(..., help="A YAML file with `tune:`, the space to search."),
    sets: list[str] = SETS,
    out: Path | None = OUT,
    limit: int | None = typer.Option(None, help="The first documents of each task only."),
    seed: int | None = typer.Option(None, help="Seed of every random choice."),
    unconfined: bool = UNCONFINED,
    save: bool = typer.Option(
        False, "--save", help="Write the choice for every sampler beside the model: a bare name takes it from there."
    ),
) -> None:
    """Search sampler parameters for the most tokens per forward within a stated loss of accuracy. Exit code 3: some
    prompts failed."""
    from dllm.eval import tune as search

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    found = search(config, [*sets, *LEAVE[:unconfined]], out=out, limit=limit, seed=seed, save=save)
    for notice in found.results.notices:
        typer.echo(notice, err=True)
    typer.echo(found.text)
    raise typer.Exit(found.results.exit_code)
