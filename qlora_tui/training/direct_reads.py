"""Finds linear modules whose weights a model's own code reads, whether or not it also calls the modules.

If packed to 4 bits, such a weight would give a wrong result or an error: Mamba's code multiplies by such a
weight, and Gemma 3n's code limits the values of one. The modules are found by a forward over a few tokens on
the meta device, where tensors have no values. If code requests a single value, it receives 1. A module that
needs more values, such as a router, fails; it then returns its input, so that the modules after it are still
observed.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qlora_tui.training.fused.kernel_choice import InstalledKernels
from qlora_tui.training.fused.patching import temporary_forwards

_TOKENS = 8


class DirectReads(NamedTuple):
    """Names of linear modules whose weights are read by the model's own code."""

    quantized: frozenset[str] = frozenset()
    """Modules whose weights the code reads if the model is quantized."""
    bypassed: frozenset[str] = frozenset()
    """Modules whose weights the code reads without ever calling them, in the quantized model or in the
    unquantized one. An adapter on such a module would have no effect.
    """


def direct_reads(model: Any, modules: Mapping[str, nn.Module]) -> DirectReads:
    """Find those linear modules of ``modules`` whose weights are read outside their own forward.

    Args:
        model: on ``meta``.
    """
    linears = {module: name for name, module in modules.items() if isinstance(module, nn.Linear)}
    files = {type(module).__module__ for module in modules.values()}
    files = {file for file in files if file.startswith("transformers.")}
    kinds = {name.rpartition(".")[2] for name in linears.values()}
    if not any(_weights_used_in(file) & kinds for file in files):
        return DirectReads()
    tokens = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    # In a quantized model some classes call modules whose weights they otherwise read.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    kernels = InstalledKernels(model)
    kernels.use_reference()
    was_training = model.training
    found: list[_Reads] = []
    try:
        # Each forward takes up to a second.
        for quantized in (True, False) if any(map(_may_be_quantized, files)) else (True,):
            found.append(reads := _Reads(linears))
            forwards = {module: reads.forward_of(module) for module in model.modules()}
            for config in configs:
                # Model code tests whether the attribute exists.
                vars(config).pop("_is_quantized", None)
                if quantized:
                    config._is_quantized = True
            for training in (True, False):
                model.train(training)
                with temporary_forwards(forwards), torch.no_grad(), reads, suppress(Exception):
                    model(input_ids=tokens, use_cache=False)
    finally:
        model.train(was_training)
        kernels.use_ours()
    return DirectReads(
        frozenset(linears[module] for module in found[0].read),
        frozenset(linears[module] for reads in found for module in reads.read - reads.called),
    )


@cache
def _weights_used_in(module_name: str) -> frozenset[str]:
    """Return the attributes whose ``weight`` a Python module uses outside its initialization functions."""
    tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    return frozenset(
        node.value.attr
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and "init" not in function.name
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)
    )


@cache
def _may_be_quantized(module_name: str) -> bool:
    """Return whether the source of a Python module tests whether the model is quantized."""
    return "_is_quantized" in inspect.getsource(sys.modules[module_name])


class _Reads(TorchFunctionMode):
    """Records the modules whose weight is used outside their forward."""

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.read: set[nn.Linear] = set()
        self.called: set[nn.Module] = set()
        self._owners: dict[int, list[nn.Linear]] = {}
        """Modules by the id of their weight. Several modules can share a weight."""
        for module in linears:
            self._owners.setdefault(id(module.weight), []).append(module)
        self._running: list[nn.Module] = []

    def forward_of(self, module: nn.Module) -> Any:
        """Return a forward that records that the module is running, and returns its input if it fails."""
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.called.add(module)
            self._running.append(module)
            try:
                return own(*args, **kwargs)
            except Exception:
                return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            finally:
                self._running.pop()

        return forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the modules whose weights a function takes; reading an attribute does not count. If a
        function requests a value, which meta tensors lack, the result is 1 or True.
        """
        reads_values = Tensor.data.__get__  # type: ignore[attr-defined]  # a descriptor
        if getattr(func, "__name__", "") != "__get__" or func == reads_values:
            for value in (*args, *(kwargs or {}).values()):
                owners = self._owners.get(id(value), [])
                if not any(module in self._running for module in owners):
                    self.read.update(owners)
        if func == Tensor.__bool__:
            return True
        if func in (Tensor.item, Tensor.__int__, Tensor.__index__):
            return 1
        return func(*args, **(kwargs or {}))
