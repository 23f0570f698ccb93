"""The content of the GGUF file of a base with a merged adapter."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tui.adapters.merged_weights import MergedWeights
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export.gguf_file.parameters import extra_tensors, hyperparameters, require_computed
from qlora_tui.export.gguf_file.vocabulary import Vocabulary, read_vocabulary
from qlora_tui.export.gguf_file.writer import FileContent
from qlora_tui.formatting import short_model_name
from qlora_tui.gguf_format.conventions import Convention, convention_of
from qlora_tui.gguf_format.tensors import SourceTensor, gguf_tensors
from qlora_tui.training.clean_files import model_view

_PHI3 = re.compile("(phi)-?3", re.IGNORECASE)
"""Pattern that llama.cpp looks for in a model's name."""
_LICENSE = re.compile(r"^license:\s*([\w.\-]+)\s*$", re.MULTILINE)


def text_config(folder: Path) -> Any:
    """Return transformers' config of the text model in a folder, including all defaults."""
    from transformers import AutoConfig

    with model_view(folder) as view:
        whole = AutoConfig.from_pretrained(str(view), trust_remote_code=False)
    config = whole.get_text_config()
    if config is not whole and hasattr(config, "logit_scale"):
        config.logit_scale = (
            1.0  # classes with a vision tower do not scale the logits (Aya Vision, Command A Vision)
        )
    # The class of the whole model decides whether the head is tied, not the text config.
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)
    # Values that differ between layers are read per layer. Other code wants the value of most layers.
    config.allow_global_per_layer_attribute_access = True
    return config


def gguf_content(source: ChatSource, tokenizer: ChatTokenizer, weights: MergedWeights) -> FileContent:
    """Return the content of a GGUF file. Raises UserError for a model that llama.cpp cannot compute."""
    config = text_config(weights.folder)
    convention = convention_of(config)
    require_computed(config, convention)
    given = (SourceTensor(tensor.name, tensor.shape, tensor.read) for tensor in weights)
    tensors = gguf_tensors(given, convention, config)
    added = extra_tensors(config)
    stored = {tensor.name for tensor in tensors}
    added |= {n: torch.zeros(shape) for n, shape in convention.unused(config).items() if n not in stored}
    extra = [
        SourceTensor(name, tuple(values.shape), partial(Tensor.clone, values))
        for name, values in added.items()
    ]
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    parameters = hyperparameters(config, convention, tensors)
    parameters.values.update(_scalars(weights, convention))
    return FileContent(
        architecture=convention.architecture,
        hyperparameters=parameters,
        vocabulary=vocabulary,
        general=_general(source, weights.folder, vocabulary),
        tensors=(*extra, *tensors),
    )


def _scalars(weights: MergedWeights, convention: Convention) -> dict[str, list[float]]:
    """Return the numbers that a GGUF file stores under keys. The weight files store them in a tensor for each
    layer.
    """
    layers: dict[str, dict[int, float]] = {key: {} for key in convention.scalars.values()}
    for tensor in weights:
        for ending, key in convention.scalars.items():
            if tensor.name.endswith(ending):
                layers[key][int(re.findall(r"\d+", tensor.name)[0])] = float(tensor.read())
    return {key: [number for _, number in sorted(numbers.items())] for key, numbers in layers.items()}


def _general(source: ChatSource, folder: Path, vocabulary: Vocabulary) -> dict[str, str | int]:
    base = short_model_name(source.recipe.model.id)
    general = general_keys(source, folder)
    return general | {
        "type": "model",
        "name": _name(str(general["name"]), vocabulary),
        "basename": base,
        "description": f"{base} with a LoRA adapter trained by qlora-tui and merged in",
    }


def general_keys(source: ChatSource, folder: Path) -> dict[str, str | int]:
    """Return the ``general.*`` keys of all exports of a run: name, base and license."""
    recipe = source.recipe
    base = short_model_name(recipe.model.id)
    general: dict[str, str | int] = {
        "name": recipe.name or f"{base}, fine-tuned",
        "base_model.count": 1,
        "base_model.0.name": base,
    }
    if recipe.name:
        general["finetune"] = recipe.name
    if folder.parent.name == "snapshots":  # in the Hub's cache
        general["base_model.0.repo_url"] = f"https://huggingface.co/{recipe.model.id}"
        if organization := recipe.model.id.rpartition("/")[0]:
            general["base_model.0.organization"] = organization
    if license_id := base_license(folder):
        general["license"] = license_id
    return general


def _name(name: str, vocabulary: Vocabulary) -> str:
    """Return the model's name, which decides whether llama.cpp selects Phi-3's tokenizer. The name is changed
    if it would select the wrong tokenizer.
    """
    if not vocabulary.strips_after_special:
        return _PHI3.sub(r"\1 3", name)
    return name if _PHI3.search(name) else f"{name} (Phi-3)"


def base_license(folder: Path) -> str:
    """Return the license in the front matter of a model's README.md; empty if it has none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return ""
    match = _LICENSE.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    return match[1] if match else ""
