"""A tiny tokenizer made on the spot, and chat templates in the manner of the families people train.

Written for these tests: each has the habit its family is known for.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora_tui.data.tokenizer import ChatTokenizer

SPECIAL = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "<|return|>", "<|start|>", "<|message|>", "<User>", "<Assistant>",
)  # fmt: skip
PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")

CHATML = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

DEFAULT_SYSTEM = (
    """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}{%- endif -%}
"""
    + CHATML
)

STRIPS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

DATED = """\
{{- bos_token + 'Today is ' + strftime_now('%d %b %Y') + '.<|eot_id|>' -}}
""" + STRIPS.removeprefix("{{- bos_token -}}\n")

NO_SYSTEM = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('No system role') -}}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Roles must alternate') -}}
{%- endif -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

MOVES_SYSTEM = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system, rest = messages[0].content + '\\n\\n', messages[1:] -%}
{%- else -%}{%- set system, rest = '', messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{{- '[INST] ' + (system if rest[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0
    else '') + m.content + '[/INST]' -}}
{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}"""

DROPS_THINKING = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set thought = m.reasoning_content or '' -%}{%- set said = m.content -%}
{%- if not thought and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

OPENS_THINKING = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- '<Assistant>' + m.content.split('</think>')[-1] + eos_token -}}
{%- else -%}{{- '<User>' + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<Assistant><think>\\n' -}}{%- endif -%}"""

ENDS_WITH_EOS = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

NO_TURN_END = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

OTHER_END_IN_HISTORY = """\
{%- for m in messages -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + -}}
{{- ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|message|>' -}}{%- endif -%}""".replace(
    "content + -}}", "content -}}"
)

MARKED = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

PARTS = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

TOOLS = """\
{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

FAMILIES: dict[str, str] = {
    "chatml": CHATML,
    "default-system": DEFAULT_SYSTEM,
    "strips": STRIPS,
    "dated": DATED,
    "no-system": NO_SYSTEM,
    "moves-system": MOVES_SYSTEM,
    "drops-thinking": DROPS_THINKING,
    "opens-thinking": OPENS_THINKING,
    "ends-with-eos": ENDS_WITH_EOS,
    "no-turn-end": NO_TURN_END,
    "other-end-in-history": OTHER_END_IN_HISTORY,
    "marked": MARKED,
    "parts": PARTS,
    "tools": TOOLS,
}
TRIMS = ("strips", "dated", "no-system")
"""Families that take white space off both ends of an answer."""


@cache
def tokenizer_json(special: tuple[str, ...] = SPECIAL, plain: tuple[str, ...] = PLAIN_ADDED) -> str:
    """A byte-level BPE of some hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "the answer is a small wild dog and it rains in Oslo\n\nuser assistant system hello goodbye"
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer.to_str()


@cache
def tokenizer_for(template: str = CHATML, stock: str = "auto") -> ChatTokenizer:
    """The tiny tokenizer with a template; with none, and a stock name, a base model's."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    return ChatTokenizer(tokenizer_json(), names, template, stock)


def family(name: str) -> ChatTokenizer:
    """The tiny tokenizer with the template of a family."""
    return tokenizer_for(FAMILIES[name])
