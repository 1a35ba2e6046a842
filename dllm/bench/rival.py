"""Another code's decoding loop beside ours: Fast-dLLM's (arXiv 2505.22618), from a folder that the user has and names.

Its own network gets the weights of our model, so that loops and networks are compared on the same work. The code of the
folder runs in this process: nobody but the user, who names it, asks for that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dllm.errors import DllmError
from dllm.models.checkpoint import part
from dllm.models.families import FAMILIES
from dllm.models.native import NativeModel

FILES = ("generate.py", "model/modeling_llada.py")
NETWORK = "LLaDAModelLM"
LOOPS = {"dual": "generate_with_dual_cache", "prefix": "generate_with_prefix_cache", "none": "generate"}  # by our cache


class Network(Protocol):
    """What the folder's class of a network is asked for."""

    config_class: Callable[..., object]

    def __call__(self, config: object) -> nn.Module:
        """An instance."""


class Kernels(NamedTuple):
    """Which attention kernels torch may choose from; the folder's network forbids some when it is built."""

    flash: bool
    efficient: bool
    math: bool
    cudnn: bool

    @classmethod
    def allowed(cls) -> Kernels:
        """Those of now."""
        cuda: Any = torch.backends.cuda  # these have no types
        return cls(
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        )

    def allow(self) -> None:
        """These from now on."""
        torch.backends.cuda.enable_flash_sdp(self.flash)
        torch.backends.cuda.enable_mem_efficient_sdp(self.efficient)
        torch.backends.cuda.enable_math_sdp(self.math)
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)


class Rival(NamedTuple):
    """The folder's network and its loops, by the name of our cache."""

    network: nn.Module
    loops: Mapping[str, Callable[..., tuple[Tensor, int]]]
    kernels: Kernels

    def decode(
        self, cache: str, prompt: Tensor, *, steps: int, new: int, block: int, mask: int
    ) -> tuple[list[int], int]:
        """New tokens of a prompt (1, L), greedy and by low confidence as published, and the forwards they took."""
        ours = Kernels.allowed()
        self.kernels.allow()
        try:
            ids, nfe = self.loops[cache](
                self.network, prompt, steps=steps, gen_length=new, block_length=block, temperature=0.0,
                remasking="low_confidence", mask_id=mask, threshold=None,
            )  # fmt: skip
        finally:
            ours.allow()
        return ids[0, prompt.shape[1] :].tolist(), int(nfe)


def check(folder: Path) -> None:
    """Errors: a file that is needed is not in the folder."""
    for name in FILES:
        if not (folder / name).is_file():
            raise DllmError(f"--against {folder}: there is no {name}; name the folder `llada` of a Fast-dLLM checkout")


@contextmanager
def rival(folder: Path, model: NativeModel) -> Iterator[Rival]:
    """The folder's loops on a network of its own with the weights of `model`. Errors: something of it is missing."""
    check(folder)
    with importable(folder.resolve()) as module:
        missing = [name for name in (NETWORK, *LOOPS.values()) if name not in vars(module)]
        if missing:
            raise DllmError(f"--against {folder}: generate.py has no {', '.join(missing)}")
        ours = Kernels.allowed()
        try:
            network = twin(vars(module)[NETWORK], model)
            theirs = Kernels.allowed()
        finally:
            ours.allow()
        yield Rival(network, {cache: vars(module)[name] for cache, name in LOOPS.items()}, theirs)


@contextmanager
def importable(folder: Path) -> Iterator[ModuleType]:
    """The folder's `generate`. Its imports are found, from the folder or relative to it, until the context ends."""
    known, path = set(sys.modules), list(sys.path)

    def under(place: str) -> bool:
        return Path(place).is_relative_to(folder)

    sys.path[:0] = [str(folder), str(folder.parent)]
    try:
        yield importlib.import_module(f"{folder.name}.generate")
    finally:
        sys.path[:] = path
        theirs = {n for n in sys.modules.keys() - known if any(map(under, places(sys.modules[n])))}
        for name in theirs:  # when all are known: a package without an __init__ looks its path up in its parent
            del sys.modules[name]


def places(module: ModuleType) -> list[str]:
    """The file of a module, or the folders of a package."""
    return [*vars(module).get("__path__", ()), *filter(None, [vars(module).get("__file__")])]


def twin(network: Network, model: NativeModel) -> nn.Module:
    """The folder's network around the weights of `model`, none of them copied. Errors: other names or shapes."""
    family = FAMILIES[model.family]
    parameters = dict(model.transformer.named_parameters())
    weights = {name: part(parameters, piece) for name, piece in family.layout(model.config).items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with Unwritten():
            made = network(network.config_class(**family.write(model.config)))
    finally:
        torch.set_default_dtype(before)
    lacks, others = made.load_state_dict(weights, strict=False, assign=True)
    if lacks or others:
        raise DllmError(f"its network has other weights than this model: {', '.join([*lacks, *others][:4])}, ...")
    return made.eval()


INITIALISERS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)


class Unwritten(TorchFunctionMode):
    """Random initial weights are not drawn: they are about to be replaced, and eight billion of them take minutes."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        if func in INITIALISERS:
            return cast("Tensor", args[0] if args else given["tensor"])
        return func(*args, **given)
