"""Verifies on the loaded model what training relies on; each check takes a few short forward passes.

Model families differ in ways that no list can cover, such as a convolution that reads across samples, or a
factor between head and loss. A shortcut that fails its check is not used, and the run's events report that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.errors import UserError, first_line
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.training.checks.attention import reference_logits, short_windows
from qlora_tui.training.checks.rounding import bitwise_equal, example_rows, within_rounding
from qlora_tui.training.experts.routing import Experts4bit
from qlora_tui.training.fused.patching import temporary_forwards
from qlora_tui.training.loss import IGNORED, ChunkedHead, losses_and_grads, stock_loss
from qlora_tui.training.scoring import no_grad_eval

_FIRST, _SECOND = 9, 7
"""Lengths of the two samples, in tokens."""
_CONTEXTS = ("max_position_embeddings", "original_max_position_embeddings")
"""Settings, anywhere in a config, that name a position beyond which rotary frequencies may change."""
_UNTRAINED = 3
"""Position in the first sample of the token that is excluded from the loss."""
_ROUNDINGS = 16.0
"""Maximum difference of the loss and of the gradient of a token's logits, in fp32 rounding errors."""
_MIN_NOISE = {torch.float32: 16 * 1.2e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Lower bound of the noise, as a share of a token's logits. Noise measured on a short sample can be too low.
"""
_NOISE = 4.0
"""Maximum difference of a token's packed logits from those of its sample alone, in multiples of the noise."""
_MAX_NOISE = 0.25
"""Maximum noise, as a share of a token's logits, at which the check is still meaningful."""
_INT8_LEAK = 1e-3
"""Maximum change in the logits of an 8-bit model if another sample changes, as a share of a token's logits.

An 8-bit model scales the outliers of one row together with those of another. All other paths separate samples
exactly, except for the grouping of experts.
"""


_LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""Errors that model code raises for inputs it does not accept."""


def require_causal(model: Any, device: torch.device) -> None:
    """Raise UserError unless later tokens of a short text leave the logits of earlier ones unchanged.

    A model whose tokens attend to later ones would learn to copy the token that it should predict. Raises
    UserError also if the model cannot compute logits from text alone, or if they are not finite.
    """
    first, _, second = _tokens(model, device)
    end = first.shape[1]
    with no_grad_eval(model), _refused_by(model, "This model cannot run on text alone"):
        continued, changed = (
            model(input_ids=torch.cat([first, after], dim=1), use_cache=False).logits
            for after in (second, second.flip(1))
        )
    before, moved = continued[0, :end], continued[0, :end] - changed[0, :end]
    if not bool(before.isfinite().all()):
        raise UserError(
            "This model computes NaN or infinity",
            what=f"{type(model).__name__}: logits are not finite.",
            why="A value in the model's config.json or weights is wrong, or the dtype has too small a range.",
            fix="Compare config.json with the one published with the model, or set "
            "quantization.compute_dtype to bfloat16 or float32.",
        )
    # Experts receive other tokens, and therefore round differently.
    allowed = _NOISE * _MIN_NOISE[before.dtype] * _rms(before)
    if len(before) != end or not bool((_rms(moved) <= allowed).all()):
        raise UserError(
            "This model does not generate text",
            what=f"{type(model).__name__}: the logits of a token change with the tokens after it.",
            why="Fine-tuning here needs a causal language model.",
            fix="Choose a model that continues text, such as Qwen, Llama or Gemma.",
        )


@contextmanager
def _refused_by(model: Any, title: str) -> Iterator[None]:
    """Raise UserError if a model fails on token ids as its only input."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise
        fix = "Choose a model that continues text, such as Qwen, Llama or Gemma."
        if model.dtype != torch.float32:  # transformers 5.24 runs xLSTM in float32 only
            fix += (
                f" Or, if its code does not run in {model.dtype}, set quantization.compute_dtype to float32."
            )
        raise UserError(
            title,
            what=f"{type(model).__name__}: {first_line(error)}",
            why="The model was given only text tokens, the only input that fine-tuning here provides.",
            fix=fix,
        ) from error


@torch.no_grad()
def prepare_for_text(model: Any, device: torch.device) -> None:
    """Let a model take text alone in training mode, in which some models require more inputs.

    * Token types, if the model requires them, are those of text: 0.
    * If the model changes its embeddings in place, no gradients are computed for them, because none are
      needed.

    Raises UserError if the model still cannot compute logits.
    """
    tokens, _, _ = _tokens(model, device)
    embedded: list[tuple[Tensor, Tensor]] = []
    embeddings: nn.Module = model.get_input_embeddings()
    was_training = model.training
    model.train()
    hook = embeddings.register_forward_hook(lambda module, args, out: embedded.append((out, out.clone())))
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                model(input_ids=tokens, use_cache=False)
            except _LIBRARY_ERRORS as error:
                if is_out_of_memory(error):
                    raise
                _give_token_types(model)
                with _refused_by(model, "This model cannot run in training mode"):
                    model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
        model.train(was_training)
    if any(not torch.equal(output, before) for output, before in embedded):
        model.disable_input_require_grads()


def _give_token_types(model: Any) -> None:
    """Pass token types to a model that requires them, marking all tokens as text."""
    named = inspect.signature(model.base_model.forward).parameters
    names = [name for name in named if name.endswith("token_type_ids")]

    def add(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        given = inputs.get("input_ids")
        shape = inputs["inputs_embeds"] if given is None else given
        zeros = torch.zeros(shape.shape[:2], dtype=torch.long, device=shape.device)
        return args, inputs | {name: zeros for name in names if inputs.get(name) is None}

    if names:
        model.base_model.register_forward_pre_hook(add, with_kwargs=True)


@torch.no_grad()
def packing_is_isolated(model: Any, device: torch.device) -> bool:
    """Return whether a sample in a packed sequence has the same outputs as the sample alone.

    To measure the noise of the model and its dtype, the sample is computed once more with the library's
    attention. Tokens that the sample cannot see are appended, so that every matrix product has as many rows
    as in a packed sequence. Our attention is compared with the library's layer by layer.

    In the packed sequence, the tested sample follows another one. The positions of the other sample are
    beyond every context length in the config, and those of the tested sample are not. A few tokens are
    therefore enough to show whether the rotary frequencies of the tested sample depend on the length of the
    other one.
    """
    first, other, second = _tokens(model, device)
    beyond = _longest_context(model)
    with no_grad_eval(model), short_windows(model):
        try:
            packed = _second_in_row(model, first, second, beyond)
            packed_after_other = _second_in_row(model, other, second, beyond)
            alone = model(input_ids=second, position_ids=_positions(second), segments=[_SECOND]).logits[0]
            longer = torch.cat([second, first], dim=1)
            expected = reference_logits(model, longer, _positions(longer))
        except _LIBRARY_ERRORS:
            return False
    size = _rms(alone)
    share = (_rms(alone - expected[:_SECOND]) / size).max().clamp(min=_MIN_NOISE[alone.dtype])
    leak, difference = _rms(packed - packed_after_other), _rms(packed - alone)
    # This form of the comparison is false for NaN, which must count as a difference.
    if not share <= _MAX_NOISE:
        return False
    return bool(
        (leak <= _allowed_leak(model, share) * size).all() and (difference <= _NOISE * share * size).all()
    )


def _allowed_leak(model: nn.Module, noise: Tensor) -> Tensor:
    """Return, for each token, the relative change in its logits that is tolerated when another sample
    changes.
    """
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        return noise.clamp(min=_INT8_LEAK)
    # A family's own experts have three-dimensional parameters, and 4-bit ones packed parameters.
    groups = any(isinstance(module, Experts4bit) for module in model.modules())
    groups = groups or any(parameter.dim() == 3 for parameter in model.parameters())
    return _NOISE * noise if groups else torch.zeros_like(noise)


def _rms(logits: Tensor) -> Tensor:
    """Return the root mean square of each token's logits: (tokens, vocabulary) to (tokens,), fp32."""
    return logits.float().square().mean(-1).sqrt()


@torch.no_grad()
def head_matches_model(model: Any, head: ChunkedHead, device: torch.device) -> bool:
    """Return whether ``head`` describes all computation from hidden states to logits, and its gradient.

    For the check, the decoder returns chosen hidden states, and the output projection returns chosen fp32
    logits, from 0 to far beyond any soft cap. So everything that the model computes between decoder and
    projection, and after the projection, is compared with the precision of fp32, whatever dtype the model
    has. The projection itself is an ``nn.Linear``.
    """
    tokens, _, _ = _tokens(model, device)
    labels = tokens.clone()
    labels[:, _UNTRAINED] = IGNORED
    decoder: nn.Module = model.get_decoder()
    given: list[Tensor] = []
    received: list[Tensor] = []
    raw = _example_logits(head).to(device).requires_grad_()

    def project(states: Tensor) -> Tensor:
        received.append(states)
        return raw[None] * 1.0  # a family may scale its input in place

    def give_chosen(module: Any, args: Any, output: Any) -> Any:
        given.append(_example_states(output[0]))
        if isinstance(output, tuple):
            return (given[-1], *output[1:])
        output[next(iter(output))] = given[-1]
        return output

    hook = decoder.register_forward_hook(give_chosen)
    try:
        with no_grad_eval(model), temporary_forwards({head.projection: project}), torch.enable_grad():
            own = stock_loss(model(input_ids=tokens, use_cache=False).logits, labels)
            (gradient,) = torch.autograd.grad(own, raw)
    except _LIBRARY_ERRORS:
        return False
    finally:
        hook.remove()
    weight = head.projection.weight
    if len(given) != 1 or len(received) != 1 or not bitwise_equal(received[0], given[0].to(weight.dtype)):
        return False
    return _is_cross_entropy(own, gradient, raw.detach(), labels[0], head)


def _example_states(states: Tensor) -> Tensor:
    """Return hidden states in the shape and dtype of ``states``, a few channels of which are very large."""
    return example_rows(*states.shape, seed=3, outlier=300).to(states.device, states.dtype)


def _example_logits(head: ChunkedHead) -> Tensor:
    """Return logits (tokens, vocabulary) in fp32 whose size grows from token to token."""
    logits = torch.randn(_FIRST, head.projection.out_features, generator=torch.Generator().manual_seed(4))
    largest = 2 * (head.softcap or 10.0) / abs(head.multiplier)
    return logits * torch.logspace(-2, 0, _FIRST)[:, None] * largest


def _is_cross_entropy(loss: Tensor, gradient: Tensor, raw: Tensor, labels: Tensor, head: ChunkedHead) -> bool:
    """Return whether loss and gradient at raw logits (tokens, vocabulary) are those of mean cross-entropy."""
    trained = torch.nonzero(labels[1:] != IGNORED)[:, 0]
    targets = labels[1:][trained, None]
    losses, logit_grads = losses_and_grads(raw[trained], targets, head, needs_grad=True)
    assert logit_grads is not None
    expected, scale = torch.zeros_like(raw), torch.zeros_like(raw)
    expected[trained] = logit_grads / len(trained)
    logits = raw[trained] * head.multiplier
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    # Rounding changes a logit, and therefore its log probability, in proportion to the logit's size.
    largest = 1 + logits.abs().amax(-1, keepdim=True)
    likely = logits.softmax(-1).scatter(1, targets, 1.0)
    scale[trained] = likely * largest * abs(head.multiplier) / len(trained)
    return within_rounding(gradient.float(), expected, scale, _ROUNDINGS) and within_rounding(
        loss.float(), losses.mean(), largest.mean(), _ROUNDINGS
    )


def _tokens(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids of a first sample, of the first sample with every token changed, and of a second
    sample.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]  # a config
    first = torch.randint(vocabulary, (1, _FIRST), generator=generator)
    second = torch.randint(vocabulary, (1, _SECOND), generator=generator)
    other = (first + vocabulary // 2) % vocabulary
    return first.to(device), other.to(device), second.to(device)


def _longest_context(model: Any) -> int:
    """Return the config's largest context length, in positions; 0 without rotary positions."""
    if not any(hasattr(module, "rope_type") for module in model.modules()):
        return 0  # learned positions end at this position
    return max(_contexts(model.config.get_text_config().to_dict()), default=0)


def _contexts(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _contexts(value)
        elif name in _CONTEXTS and isinstance(value, int):
            yield value


def _second_in_row(model: nn.Module, first: Tensor, second: Tensor, first_position: int) -> Tensor:
    row = torch.cat([first, second], dim=1)
    positions = torch.cat([first_position + _positions(first), _positions(second)], dim=1)
    logits: Tensor = model(input_ids=row, position_ids=positions, segments=[_FIRST, _SECOND]).logits
    return logits[0, _FIRST:]


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]
