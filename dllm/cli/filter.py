"""`dllm filter`: collect traces, train and evaluate learned filters (Learn2PD)."""

from __future__ import annotations

from pathlib import Path

import typer

from dllm.cli.options import loaded, loading, located, takes

filter_app = typer.Typer(no_args_is_help=True, help="Learned filters: collect traces, train, evaluate.")


@filter_app.command()
@takes(loading)
def collect(
    out: Path = typer.Argument(..., help="Traces to write (safetensors)."),
    prompts: Path = typer.Option(None, help="A text file with one prompt a line; default: the embedded tasks."),
    n: int = typer.Option(200, min=3, help="Prompts to take."),
    max_new_tokens: int = typer.Option(64, min=1),
    block_length: int = typer.Option(32, min=1),
    feature: str = typer.Option("log1m", help="log1m, prob or negent."),
    on_policy: Path = typer.Option(None, help="A filter: follow its own path, label by the teacher."),
    seed: int = 0,
    **common: object,
) -> None:
    """Record what the model is sure of, and where it is right, along the greedy parallel path."""
    from dllm.samplers.learn2pd import Filter
    from dllm.training import filters
    from dllm.training.data import read_prompts

    texts = read_prompts(prompts)[:n] if prompts else embedded_prompts(n, seed)
    traces = filters.collect(
        loaded(common)[0], texts, max_new_tokens=max_new_tokens, block_length=block_length, feature=feature,
        filter=Filter.load(on_policy) if on_policy else None,
    )  # fmt: skip
    traces.save(out)
    typer.echo(f"{out}: {len(traces.prompt)} rows of {len(texts)} prompts")


def embedded_prompts(n: int, seed: int) -> list[str]:
    """Training prompts of all embedded tasks in turn."""
    from dllm.tasks.registry import PAIR_TASKS, generate

    each = [[e.prompt for e in generate(name, "train", -(-n // len(PAIR_TASKS)), seed)] for name in PAIR_TASKS]
    return [p for group in zip(*each, strict=True) for p in group][:n]


@filter_app.command()
def train(
    traces: list[Path] = typer.Argument(..., help="Traces of `dllm filter collect`; several are joined."),
    out: Path = typer.Option(..., help="The filter to write (safetensors)."),
    kind: str = typer.Option("shared", help="shared: any block length; block: the paper's shape."),
    precision: float = typer.Option(0.98, min=0, max=1, help="Target on validation prompts; decides tau."),
    epochs: int = typer.Option(30, min=1),
    seed: int = 0,
) -> None:
    """Train a filter on traces and choose its threshold."""
    from dllm.training import filters

    tables = [filters.Traces.load(path) for path in traces]
    made = filters.train(filters.join(tables), filters.Recipe(kind=kind, precision=precision, epochs=epochs, seed=seed))
    made.save(out)
    figures = {k: v for k, v in (made.meta or {}).items() if k.startswith("test_")}
    typer.echo(f"{out}: tau {made.tau:.4f}; " + ", ".join(f"{k[5:]} {v}" for k, v in figures.items()))


@filter_app.command("eval")
def evaluate(
    filter: Path = typer.Argument(..., help="A filter of `dllm filter train`."),
    traces: Path = typer.Argument(..., help="Traces that it was not trained on."),
) -> None:
    """Offline figures of a filter, beside a plain threshold of equal precision."""
    from dllm.samplers.learn2pd import Filter
    from dllm.training import filters

    for key, value in filters.evaluate(Filter.load(filter), filters.Traces.load(traces)).items():
        typer.echo(f"{key:20} {value:.4f}")


@filter_app.command()
@takes(loading)
def compare(
    filter: Path = typer.Argument(None, help="A filter of `dllm filter train`; default: the embedded one."),
    n: int = typer.Option(1500, min=2, help="Test problems a task."),
    validation: int = typer.Option(200, min=2, help="Problems a task on which the settings are chosen."),
    task: list[str] = typer.Option(None, help="word_problems, sudoku, functions; default: all three."),
    out: Path = typer.Option("filter-compare.jsonl", help="Answers so far; a run that was stopped goes on from it."),
    workers: int = typer.Option(1, min=1, help="Processes, one torch thread each."),
    **common: object,
) -> None:
    """Decode with the filter and with the plain threshold, and compare them at equal accuracy. Resumable."""
    from dllm.bench import filters as bench_filters
    from dllm.tasks.registry import PAIR_TASKS

    model, names = located(common)[0], task or list(PAIR_TASKS)
    typer.echo(bench_filters.run(filter, model, out=out, n=n, validation=validation, task_names=names, workers=workers))
