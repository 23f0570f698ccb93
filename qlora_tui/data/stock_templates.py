"""Chat templates for base models without one; the trainer saves the chosen one with the adapter.

Chosen by ``ChatTokenizer``: ``model.chat_template``; ``auto`` takes the model's own, else ``chatml``.

Each ends an assistant turn with a token the base model knows: its own turn-end token where its vocabulary has
the one that the template is named after, else its end-of-text token. The words around the turns
(``<|im_start|>``, ``### Response:``) are plain text to a model that has no such tokens.
"""

from __future__ import annotations

from collections.abc import Container

_CHATML = """\
BEGIN{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + TURN_END + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA_3 = """\
BEGIN{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + TURN_END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_ALPACA = """\
BEGIN{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + TURN_END + '\\n\\n' -}}
{%- else -%}
{{- '### Input:\\n' + message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

_PLAIN = """\
BEGIN{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- message['content'] + TURN_END -}}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

_TURN_ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}
_TEXTS = {"chatml": _CHATML, "llama-3": _LLAMA_3, "alpaca": _ALPACA, "plain": _PLAIN}


def stock_template(name: str, added_tokens: Container[str], begins_with_bos: bool) -> str:
    """Return the stock template ``name`` for a tokenizer with these added tokens."""
    end = _TURN_ENDS.get(name, "")
    end = f"'{end}'" if end and end in added_tokens else "eos_token"
    return (
        _TEXTS[name]
        .replace("TURN_END", end)
        .replace("BEGIN", "{{- bos_token -}}\n" if begins_with_bos else "")
    )
