"""Tiny models with an adapter and data, as a run leaves them, and what their exports are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.recipe.schema import Data, Model, Quantization, Recipe, Source
from tests.chat.adapters import make_adapter
from tests.export.published_tokenizers import write_tokenizer
from tests.export.tiny_models import SIZES, randomize

TEMPLATES = {
    "smollm2": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama-3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "llama-2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} "
    "{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
}


def make_source(
    folder: Path,
    tokenizer: str = "smollm2",
    model_type: str = "llama",
    *,
    quantization: str = "none",
    adapter: dict[str, Any] | None = None,
    rows: int = 12,
    **config: Any,
) -> ChatSource:
    """Write a random model with an adapter and a file of conversations; returns them as a run's result."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = write_tokenizer(folder / "model", tokenizer, TEMPLATES[tokenizer])
    chat_tokenizer = ChatTokenizer.from_folder(model)
    vocabulary = chat_tokenizer.backend.get_vocab_size()
    settings = {**SIZES, "vocab_size": vocabulary, "eos_token_id": chat_tokenizer.eos_id, **config}
    network: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(model_type, **settings), attn_implementation="eager"
    )
    randomize(network).save_pretrained(model)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(CONVERSATIONS.read_text().splitlines()[:rows]))
    make_adapter(model, folder / "adapter", **(adapter or {}))
    recipe = Recipe(
        name="tiny",
        model=Model(id=str(model)),
        data=Data(sources=(Source(path=str(data)),), validation_fraction=0.5),
        quantization=Quantization(method=quantization, compute_dtype="float32"),  # type: ignore[arg-type]
    )
    return ChatSource(recipe=recipe, adapters={"adapter": str(folder / "adapter")})
