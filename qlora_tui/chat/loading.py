"""Loads a chat session: the base, quantized as in the recipe, and the tokenizer of the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tui.adapters.base_weights import StatusFn, every_tenth, model_folder
from qlora_tui.chat.adapters import uses_dora
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.cpu import dequantize_on_cpu, use_cpu_layout
from qlora_tui.chat.session import ChatSession, reported_memory
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.formatting import short_model_name
from qlora_tui.memory.execution import AttentionPath
from qlora_tui.training.compute_device import ComputeDevice, find_device
from qlora_tui.training.experts.lora import fuse_experts
from qlora_tui.training.model import load_base
from qlora_tui.training.streaming.placement import place_streamed


def load_session(
    source: ChatSource, on_status: StatusFn = lambda words: None, *, streams: bool = False
) -> ChatSession:
    """Load the base model of ``source``. Its adapters are loaded on first use.

    With ``streams``, the layers that the recipe streams stay in host memory and are copied to the GPU for
    every token. Such a session cannot be used by code that reads the weights.

    Raises UserError if the model cannot be loaded.
    """
    recipe = source.recipe
    folder = model_folder(recipe, on_status)
    # For a path, only its last part: paths of converted models are long.
    is_path = Path(recipe.model.id).is_absolute()
    words = f"Loading {short_model_name(recipe.model.id) if is_path else recipe.model.id}"
    on_status(words)
    device = find_device(recipe)
    tokenizer = chat_tokenizer(source, folder)
    attention_path: AttentionPath = "eager" if recipe.model.attention == "eager" else "segments"
    count = recipe.quantization.streamed_layers if streams else 0
    with reported_memory(device):
        model = load_base(
            folder, recipe, device, attention_path, every_tenth(on_status, words), to_host=count > 0
        )
        if count:
            return _streamed_session(source, model, tokenizer, device, on_status)
    model.eval()
    fuse_experts(model)
    on_cpu = device.kind == "cpu"
    dequantized = on_cpu and dequantize_on_cpu(model, device)
    if on_cpu and not dequantized and not any(map(uses_dora, source.adapters.values())):
        use_cpu_layout(model)
    return ChatSession(source, model, tokenizer, device)


def _streamed_session(
    source: ChatSource, model: Any, tokenizer: ChatTokenizer, device: ComputeDevice, on_status: StatusFn
) -> ChatSession:
    streamed = place_streamed(model, source.recipe.quantization.streamed_layers, device.torch_device)
    on_status(f"{len(streamed)} layers stay in host memory and are copied for every token: answers are slow")
    session = ChatSession(source, model.eval(), tokenizer, device)
    if session.steps is not None:
        session.steps.turn_off(f"{len(streamed)} layers are copied from host memory for every token.")
    return session


def chat_tokenizer(source: ChatSource, folder: Path) -> ChatTokenizer:
    """Load the tokenizer from an adapter's folder, with the chat template used in training.

    If no adapter has a tokenizer, load the model's own with the template of the recipe.
    """
    for adapter in map(Path, source.adapters.values()):
        if (adapter / "tokenizer.json").is_file():
            return ChatTokenizer.from_folder(adapter)
    return ChatTokenizer.from_folder(folder, source.recipe.model.chat_template)
