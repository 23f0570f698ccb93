"""Chat templates in the manner of thinking models, and those the ``trl`` package ships as published.

The first are written for these tests: each has the habit its family is known for.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from qlora_tui.data.tokenizer import ChatTokenizer
from tests.data.families import SPECIAL, tokenizer_json

_SPEC = importlib.util.find_spec("trl")
_FOLDER = Path(_SPEC.origin).parent / "chat_templates" if _SPEC and _SPEC.origin else Path("no-trl")

SMOLLM3 = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{{- '<|im_start|>system\\nReasoning Mode: ' + mode + '\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- generation -%}
{{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') -}}
{{- m.content.lstrip('\\n') + '<|im_end|>\\n' -}}
{%- endgeneration -%}
{%- elif m.role != 'system' -%}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') -}}
{%- endif -%}"""
"""The mode in the system prompt, empty thoughts in every answer, generation marks that hold the header."""

DEEPSEEK_V31 = """\
{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<User>' + m.content -}}
{%- elif m.role == 'assistant' -%}{{- '<Assistant></think>' + m.content.split('</think>')[-1] + eos_token -}}
{%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<Assistant>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}"""
"""A prompt that opens a thought or closes it, and an answer that has always closed it."""

GRANITE = """\
{%- if messages[0].role == 'system' -%}{%- set system, rest = messages[0].content, messages[1:] -%}
{%- else -%}{%- set system, rest = 'Be kind.', messages -%}{%- endif -%}
{%- if thinking -%}{%- set system = system + ' Think between tags first.' -%}{%- endif -%}
{{- '<|start|>system<|message|>' + system + '<|end|>\\n' -}}
{%- for m in rest -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|message|>' -}}{%- endif -%}"""
"""Thinking is asked for in the system prompt and is off unless it is; history keeps what was thought."""

WIDE_OPENING = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.last -%}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n\\n' + ('</think>\\n\\n' if enable_thinking is false else '') -}}
{%- endif -%}"""
"""Another white space after an opened thought in the prompt than in the text."""

OURS = {
    "smollm3": SMOLLM3,
    "deepseek-v3.1": DEEPSEEK_V31,
    "granite": GRANITE,
    "wide-opening": WIDE_OPENING,
}
PUBLISHED = tuple(
    name
    for name in (
        "qwen3",
        "qwen3_5_think",
        "qwen3_5_nothink",
        "qwen3_8",
        "deepseek_r1_distill",
        "deepseekv3",
        "gptoss",
        "glm4moe",
        "gemma4",
        "gemma4_v5",
        "nemotron_3_nano",
    )
    if (_FOLDER / f"{name}.jinja").is_file()
)
THINKERS = (*OURS, *PUBLISHED)
_MORE = (
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|channel|>", "<|call|>", "<sop>", "[gMASK]",
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>",
)  # fmt: skip


def template_text(name: str) -> str:
    """The template of a thinking model."""
    return OURS[name] if name in OURS else (_FOLDER / f"{name}.jinja").read_text()


@cache
def thinker(name: str, special_tags: bool = False) -> ChatTokenizer:
    """A tiny tokenizer with that template. ``special_tags``: it calls ``<think>`` a special token."""
    tags = ("<think>", "</think>")
    added = tokenizer_json((*SPECIAL, *_MORE, *(tags if special_tags else ())), () if special_tags else tags)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    return ChatTokenizer(added, names, template_text(name))
