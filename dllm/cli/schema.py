"""`dllm schema`: what a YAML file may say, as JSON Schema for editors."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What is described."""

    EVAL = "eval"
    TUNE = "tune"
    TRAIN = "train"
    ALIGN = "align"
    PAIR_HEAD = "pair-head"
    HEAD = "head"
    SERVE = "serve"
    SAMPLERS = "samplers"


def schema(kind: Annotated[Kind, typer.Argument(help="Files of a command, or specifications of samplers.")]) -> None:
    """Print the JSON Schema (2020-12) of a YAML file: keys, types, ranges and what they are for."""
    from dllm.eval import config, tuning
    from dllm.samplers import registry
    from dllm.serve.config import ServeConfig
    from dllm.spec import document, keys_of
    from dllm.training.config import TrainConfig, recipe_schema

    found = {
        Kind.EVAL: config.schema,
        Kind.TUNE: tuning.schema,
        Kind.TRAIN: lambda: document(keys_of(TrainConfig)),
        Kind.ALIGN: lambda: recipe_schema("drafter"),
        Kind.PAIR_HEAD: lambda: recipe_schema("pair-head"),
        Kind.HEAD: lambda: recipe_schema("head"),
        Kind.SERVE: lambda: document(keys_of(ServeConfig)),
        Kind.SAMPLERS: registry.schema,
    }
    typer.echo(json.dumps(found[kind](), indent=1))
