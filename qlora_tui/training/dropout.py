"""Where a model draws random numbers while it trains: dropout, and noise on the inputs of routers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


class DropoutSetting(NamedTuple):
    """A probability that is not 0: an attribute of a module or of its config."""

    owner: Any
    name: str
    value: float


def dropout_settings(model: nn.Module) -> list[DropoutSetting]:
    """Every dropout probability of the model and its adapter that is not 0.

    Dropouts are modules, probabilities that a module passes to a function (``attention_dropout``), and, in
    Falcon, ones that it reads from its config at each call.
    """
    return [
        DropoutSetting(owner, name, value)
        for owner, name, value in _floats(model)
        if "drop" in name or (name == "p" and isinstance(owner, _DropoutNd))
    ]


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a forward in training mode may draw random numbers, which a recomputation must repeat."""
    jitters = any("jitter" in name for _, name, _ in _floats(model))
    return jitters or bool(dropout_settings(model))


def _floats(model: nn.Module) -> list[DropoutSetting]:
    modules = list(model.modules())
    configs = {id(config): config for m in modules if (config := getattr(m, "config", None)) is not None}
    return [
        DropoutSetting(owner, name, value)
        for owner in (*modules, *configs.values())
        for name, value in vars(owner).items()
        if isinstance(value, float) and value
    ]
