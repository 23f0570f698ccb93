"""A card that is played: tensors that say they are on one, and are computed with on the CPU.

What a real card refuses is told: an operation on its tensors and on one of the CPU's. So is what would wait
for it. Arithmetic is the CPU's, memory and speed are not played. torch knows the device as
its own kind ("privateuseone"), which is set up once for a process and stays: for a process of its own.
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

KIND, CARD = "card", "card:0"
_MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::_index_put_impl")
"""A copy to or from the card, and places given from the CPU."""
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
"""What has to know a value: the CPU stands until the card has come so far."""


class OnCard(Tensor):
    """A tensor of the card. ``on_cpu`` has its values."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> OnCard:
        made: OnCard = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(CARD),
        )
        made.on_cpu = on_cpu
        return made

    def __init__(self, on_cpu: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {}, Told())


@dataclass
class Told:
    """What became of operations on the card."""

    refused: list[str] = field(default_factory=list)
    """What a real one would have stopped at. Not raised: torch does not outlive it in its own threads."""
    waits: list[str] = field(default_factory=list)
    """Who waited for it."""


@contextmanager
def card() -> Iterator[Told]:
    """Within it tensors may be made on the card."""
    told = Told()
    with _FromNumbers(), _Operations(told):
        yield told


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __init__(self, told: Told) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self._told)


class _FromNumbers(TorchFunctionMode):
    """Tensors made of Python's numbers: torch makes them without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if (
            func in (torch.tensor, torch.as_tensor)
            and device is not None
            and torch.device(device).type == KIND
        ):
            return OnCard(func(*args, **kwargs | {"device": "cpu"}))
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]
        return func(*args, **kwargs)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def set_up() -> None:
    """Let torch know of the device."""
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Module())
    # Or a module could not be moved to tensors of another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def put_on_card(model: nn.Module) -> None:
    """Every weight of a model, what its 4-bit weights are read with, and its buffers; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = moved.setdefault(id(parameter), _moved(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnCard(buffer)


def values(tensor: Tensor) -> Tensor:
    """On the CPU, without waiting."""
    return tensor.on_cpu if isinstance(tensor, OnCard) else tensor


def _moved(parameter: nn.Parameter) -> nn.Parameter:
    moved = nn.Parameter(OnCard(parameter.detach().clone()), requires_grad=parameter.requires_grad)
    for name, held in vars(parameter).items():
        setattr(moved, name, _state_moved(held) if name == "quant_state" and held is not None else held)
    return moved


def _state_moved(state: Any) -> Any:
    """bitsandbytes' scales and codes; those of double quantization lie one within the other."""
    moved = copy.copy(state)
    for name, held in vars(state).items():
        if isinstance(held, Tensor):
            setattr(moved, name, OnCard(held))
    moved.state2 = None if state.state2 is None else _state_moved(state.state2)
    return moved


def _run(func: Any, args: Any, kwargs: Any, told: Told) -> Any:
    name = func._schema.name
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_card = [tensor for tensor in given if isinstance(tensor, OnCard)]
    if on_card:
        if _mixes(name, given):
            told.refused.append(f"{name} {_asked_by()}")
        if name in _WAITS or _leaves(name, device, args) or _counts_out(name, given):
            told.waits.append(f"{name} {_asked_by()}")
    plain = dict(kwargs, device="cpu") if device is not None else kwargs
    made = func(*tree_map(values_of, args), **tree_map(values_of, plain))
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    stays = device.type == KIND if device is not None else bool(on_card)
    return tree_map(lambda x: OnCard(x) if stays and isinstance(x, Tensor) else x, made)


def values_of(leaf: Any) -> Any:
    """Of anything that is given."""
    return values(leaf) if isinstance(leaf, Tensor) else leaf


def _mixes(name: str, given: list[Tensor]) -> bool:
    """Whether tensors of both are computed with. A number is taken from anywhere."""
    may = name.rstrip("_") in _MAY_MIX
    return not may and any(not isinstance(tensor, OnCard) and tensor.dim() for tensor in given)


def _leaves(name: str, device: torch.device | None, args: Any) -> bool:
    """Whether values are taken to the CPU."""
    copied = name == "aten::copy_" and not isinstance(args[0], OnCard)
    return copied or (device is not None and device.type == "cpu")


def _counts_out(name: str, given: list[Tensor]) -> bool:
    """An index of true and false: how many are true has to be known."""
    return name.startswith("aten::index") and any(tensor.dtype == torch.bool for tensor in given[1:])


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation in place gives back: the tensor it was given."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            held = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(held, Tensor):
                return held if len(func._schema.returns) == 1 else None
    return None


def _asked_by() -> str:
    """The last function of the project, or of a library, that asked; torch's own backward is none of them."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename.rpartition('/')[2]} {frame.name}"
    return "backward"
