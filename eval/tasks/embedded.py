"""The tasks of `dllm.tasks`: the test split of their generators, graded by them; functions are run, confined."""

from __future__ import annotations

from dllm.eval.config import GenerateSpec, TaskSpec
from dllm.eval.tasks.base import Document, Graded, Task, takes
from dllm.eval.tasks.scorers import judged
from dllm.tasks import registry as source

NAMES = tuple(source.TASKS)
DOCUMENTS = 100  # without `limit`: what two cores decode in half a minute
# Longer than the answers, as most calls are; the others take their window.
LENGTH = {"word_problems": 96, "sudoku": 32, "functions": 64}

# Both functions meet the same inputs; fresh copies, since a function may change the list that it is given.
_CHECK = """
import copy
reference = {{}}
exec({reference!r}, reference)
for inputs in {inputs!r}:
    assert f(*copy.deepcopy(inputs)) == reference["f"](*copy.deepcopy(inputs)), inputs
"""


def load(spec: TaskSpec, limit: int | None) -> Task:
    """The first `limit` problems (100 unless stated) of a split; the same for the same seed."""
    takes(spec, "split", "seed")
    examples = source.generate(spec.name, spec.split, limit or DOCUMENTS, spec.seed)
    documents = tuple(
        Document(f"{spec.split}-{spec.seed}-{i}", e.prompt, e.answer, {"example": e}) for i, e in enumerate(examples)
    )
    code, length = spec.name == "functions", LENGTH.get(spec.name, source.task(spec.name).window)

    def score(document: Document, text: str) -> Graded:
        example = document.meta["example"]
        if code:
            check = _CHECK.format(reference=document.target, inputs=example.meta["inputs"])
            return judged(text, check, text, entries=("f",))
        return Graded(float(source.grade(spec.name, example, text)), text)

    return Task(spec.name, "1", documents, score, GenerateSpec(max_new_tokens=length), runs_code=code)
