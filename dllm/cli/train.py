"""`dllm train`: run a recipe, go on with it, or measure the models that it made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm.errors import DllmError


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, such as configs/train/tiny.yaml.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--eval", help="Train nothing: accuracy of the recipe's model, or of the embedded pair without one."
        ),
    ] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="With --eval: held-out problems a task.")] = 500,
    seed: Annotated[int, typer.Option(help="With --eval: which problems.")] = 0,
) -> None:
    """Train a masked-diffusion model or its autoregressive twin, or measure the embedded pair (--eval)."""
    if recipe is None and not evaluate:
        raise DllmError("name a recipe, such as configs/train/tiny.yaml, or ask for --eval of the embedded pair")
    if evaluate and resume:
        raise DllmError("--eval trains nothing: leave out --resume")
    from dllm.training.config import load_config

    config = load_config(recipe, overrides or ()) if recipe is not None else None
    if evaluate:
        from dllm.tasks.registry import PAIR_TASKS
        from dllm.training.evaluate import evaluate_pair

        folders = ("tiny", "tiny-ar") if config is None else (Path(config.output) / "model",)
        names = PAIR_TASKS if config is None else tuple(config.data.tasks) or PAIR_TASKS
        for row in evaluate_pair(problems, seed, folders, names):
            typer.echo(str(row))
        return
    from dllm.training.trainer import Trainer

    assert config is not None
    Trainer(config, resume).run()
    typer.echo(f"trained model: {Path(config.output) / 'model'}")
