"""A fake GPU: tensors that report a GPU as their device and are computed on the CPU.

Two things are logged: operations that a real GPU refuses, because they mix its tensors with those of the
CPU, and operations that synchronize. Arithmetic is the CPU's; memory and speed are not simulated. torch knows
the device as its own kind ("privateuseone"). It is set up once per process and stays, so use a separate one.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND, FAKE_DEVICE = "fakegpu", "fakegpu:0"
_COPIES = ("aten::copy_", "aten::_to_copy")
_WAITS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
)
"""Operations that need a value, so the CPU waits for the GPU."""


class FakeCudaTensor(Tensor):
    """A tensor on the fake GPU. ``on_cpu`` holds its values."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> FakeCudaTensor:
        tensor: FakeCudaTensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(FAKE_DEVICE),
        )
        tensor.on_cpu = on_cpu
        return tensor

    def __init__(self, on_cpu: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {}, DeviceLog())


@dataclass
class DeviceLog:
    """What happened to operations on the fake GPU."""

    refused: list[str] = field(default_factory=list)
    """What a real GPU would have refused. Not raised: torch's own threads do not survive an exception."""
    waits: list[str] = field(default_factory=list)
    """Which functions waited for the GPU."""


@contextmanager
def fake_cuda() -> Iterator[DeviceLog]:
    """Let tensors be created on the fake GPU."""
    log = DeviceLog()
    with _FromNumbers(log), _Operations(log):
        yield log


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self, log: DeviceLog) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self._log)


class _FromNumbers(TorchFunctionMode):
    """Catches tensors created from Python numbers, which torch creates without a dispatch mode."""

    def __init__(self, log: DeviceLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        creates = func in (torch.tensor, torch.as_tensor)
        if creates and _is_fake_cuda(kwargs.get("device")) and not isinstance(args[0], Tensor):
            self._log.waits.append(f"{func.__name__} {_caller()}")
            return FakeCudaTensor(func(*args, **kwargs | {"device": "cpu"}))
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]
        return func(*args, **kwargs)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def set_up() -> None:
    """Register the device with torch."""
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
    # Or a module could not be moved to tensors of another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def move_to_fake_cuda(model: nn.Module) -> None:
    """Every weight of a model, what its 4-bit weights are read with, and its buffers; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = moved.setdefault(id(parameter), _moved(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeCudaTensor(buffer)


def values(tensor: Tensor) -> Tensor:
    """On the CPU, without waiting."""
    return tensor.on_cpu if isinstance(tensor, FakeCudaTensor) else tensor


def _moved(parameter: nn.Parameter) -> nn.Parameter:
    moved = nn.Parameter(FakeCudaTensor(parameter.detach().clone()), requires_grad=parameter.requires_grad)
    for name, held in vars(parameter).items():
        setattr(moved, name, _state_moved(held) if name == "quant_state" and held is not None else held)
    return moved


def _state_moved(state: Any) -> Any:
    """bitsandbytes' scales and codes; those of double quantization lie one within the other."""
    moved = copy.copy(state)
    for name, held in vars(state).items():
        if isinstance(held, Tensor):
            setattr(moved, name, FakeCudaTensor(held))
    moved.state2 = None if state.state2 is None else _state_moved(state.state2)
    return moved


def _run(func: Any, args: Any, kwargs: Any, log: DeviceLog) -> Any:
    name = func._schema.name
    device = kwargs.get("device")
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(tensor, FakeCudaTensor) for tensor in given)
    if on_gpu and _mixes(func, name, args, given, _written(func, args, kwargs)):
        log.refused.append(f"{name} {_caller()}")
    if _waits(name, args, kwargs, on_gpu=on_gpu):
        log.waits.append(f"{name} {_caller()}")
    plain = dict(kwargs, device="cpu") if _is_fake_cuda(device) else kwargs
    result = func(*tree_map(values_of, args), **tree_map(values_of, plain))
    written = _written(func, args, kwargs)
    if written is not None:
        return written if len(func._schema.returns) == 1 else None
    stays = on_gpu if device is None else _is_fake_cuda(device)
    return tree_map(lambda x: FakeCudaTensor(x) if stays and isinstance(x, Tensor) else x, result)


def values_of(leaf: Any) -> Any:
    """Of anything that is given."""
    return values(leaf) if isinstance(leaf, Tensor) else leaf


def _is_fake_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == KIND


def _mixes(func: Any, name: str, args: Any, given: list[Tensor], written: Tensor | None) -> bool:
    """Whether an operation mixes tensors of the CPU and of the GPU."""
    if name in _COPIES:
        return False
    if written is not None and not isinstance(written, FakeCudaTensor):
        return True
    if "index_put" in name or name in ("aten::index", "aten::_unsafe_index"):
        # Places may be given from the CPU; what they are places of may not, nor what is put there.
        given = [args[0], *args[2:3]]
    numbers = torch.Tag.pointwise in func.tags or "index_put" in name
    return any(
        not isinstance(tensor, FakeCudaTensor) and not (numbers and tensor.dim() == 0) for tensor in given
    )


def _waits(name: str, args: Any, kwargs: Any, *, on_gpu: bool) -> bool:
    """Whether the CPU waits: for a value, or for a copy that is not non_blocking."""
    if name == "aten::copy_":
        there, here = (isinstance(tensor, FakeCudaTensor) for tensor in args[:2])
        return there != here and not (there and _is_non_blocking(args[2:], kwargs))
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        comes = _is_fake_cuda(kwargs["device"])
        return comes != on_gpu and not (comes and _is_non_blocking((), kwargs))
    counts_out = "index" in name and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:2])
    )
    return on_gpu and (name in _WAITS or counts_out)


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or any(args))


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation in place writes to, and gives back."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            held = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(held, Tensor):
                return held
    return None


def _caller() -> str:
    """The innermost caller outside torch; ``backward`` for torch's own threads."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename.rpartition('/')[2]} {frame.name}"
    return "backward"
