"""What the GGUF file of a base with a merged adapter holds.

llama.cpp stores experts as one tensor for a projection of all experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_tui.adapters.merged_weights import MergedTensor, MergedWeights
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export.gguf_file.families import TensorNames, extra_tensors, hyperparameters
from qlora_tui.export.gguf_file.vocabulary import Vocabulary, read_vocabulary
from qlora_tui.export.gguf_file.writer import FileContent, SourceTensor
from qlora_tui.formatting import short_model_name
from qlora_tui.training.clean_files import model_view

_OF_ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+\.weight)")


def stack_experts(tensors: Iterable[MergedTensor]) -> Iterator[MergedTensor]:
    """Yield all tensors, with the matrices of experts as one tensor (experts, rows, columns).

    ``mlp.experts.0.up_proj.weight`` to ``mlp.experts.127.up_proj.weight`` become
    ``mlp.experts.up_proj.weight``, in the place of the first.
    """
    stacks: dict[str, dict[int, MergedTensor]] = {}
    order: list[MergedTensor | str] = []
    for tensor in tensors:
        match = _OF_ONE_EXPERT.fullmatch(tensor.name)
        if match is None:
            order.append(tensor)
            continue
        name = f"{match['experts']}.{match['projection']}"
        if name not in stacks:
            stacks[name] = {}
            order.append(name)
        stacks[name][int(match["number"])] = tensor
    for each in order:
        if isinstance(each, MergedTensor):
            yield each
        else:
            members = [tensor for _, tensor in sorted(stacks[each].items())]
            yield MergedTensor(each, (len(members), *members[0].shape), partial(_stacked, members))


def _stacked(members: Sequence[MergedTensor]) -> Tensor:
    """The values of the members, (members, rows, columns)."""
    stack: Tensor | None = None
    for number, member in enumerate(members):
        values = member.read()
        if stack is None:
            stack = values.new_empty(len(members), *member.shape)
        stack[number] = values
    assert stack is not None
    return stack


_PHI3 = re.compile("(phi)-?3", re.IGNORECASE)
"""What llama.cpp looks for in a model's name."""
_LICENSE = re.compile(r"^license:\s*([\w.\-]+)\s*$", re.MULTILINE)


def text_config(folder: Path) -> Any:
    """Return transformers' config of the text model in a folder, with every default filled in."""
    from transformers import AutoConfig

    with model_view(folder) as view:
        return AutoConfig.from_pretrained(str(view), trust_remote_code=False).get_text_config()


def gguf_content(source: ChatSource, tokenizer: ChatTokenizer, weights: MergedWeights) -> FileContent:
    """Return the content of a GGUF file. Raises UserError for a model that llama.cpp cannot compute."""
    config = text_config(weights.folder)
    names = TensorNames(config)
    parameters = hyperparameters(config)
    tensors = [
        SourceTensor(name, tensor.shape, partial(_values, names, tensor))
        for tensor in stack_experts(weights)
        if (name := names.name_of(tensor.name)) is not None
    ]
    extra = [
        SourceTensor(name, tuple(values.shape), partial(Tensor.clone, values))
        for name, values in extra_tensors(config).items()
    ]
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    return FileContent(
        architecture=names.family.architecture,
        hyperparameters=parameters,
        vocabulary=vocabulary,
        general=_general(source, weights.folder, vocabulary),
        tensors=(*extra, *tensors),
    )


def _values(names: TensorNames, tensor: MergedTensor) -> Tensor:
    values = tensor.read()
    change = names.transform_for(tensor.name)
    return values if change is None else change(values)


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
    """Return the ``general.*`` keys of everything that a run exports: its name, its base, the license."""
    recipe = source.recipe
    base = short_model_name(recipe.model.id)
    general: dict[str, str | int] = {
        "name": recipe.name or f"{base}, fine-tuned",
        "base_model.count": 1,
        "base_model.0.name": base,
    }
    if recipe.name:
        general["finetune"] = recipe.name
    if resolve_model(recipe.model.id).source == "hub cache":
        general["base_model.0.repo_url"] = f"https://huggingface.co/{recipe.model.id}"
        if organization := recipe.model.id.rpartition("/")[0]:
            general["base_model.0.organization"] = organization
    if license_id := base_license(folder):
        general["license"] = license_id
    return general


def _name(name: str, vocabulary: Vocabulary) -> str:
    """Return a name by which llama.cpp recognizes Phi-3's tokenizer, and no other as Phi-3's."""
    if not vocabulary.strips_after_special:
        return _PHI3.sub(r"\1 3", name)
    return name if _PHI3.search(name) else f"{name} (Phi-3)"


def base_license(folder: Path) -> str:
    """Return the license that a model's README.md names in its front matter; empty if it names none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return ""
    match = _LICENSE.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    return match[1] if match else ""
