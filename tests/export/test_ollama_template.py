"""The TEMPLATE of a Modelfile: what it renders is what the model was trained on."""

from __future__ import annotations

import pytest

from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export.ollama_template import go_literal, ollama_template, render_go_template
from tests.data.families import FAMILIES, tokenizer_for

ONE = [Message("user", "Why?")]
THREE = [*ONE, Message("assistant", 'Because\n"of" it'), Message("user", "And {{ .Content }}?")]
FIVE = [*THREE, Message("assistant", "Über 🙂"), Message("user", "So")]
SYSTEM = Message("system", "Be brief.\n\nBe kind.")
STOCK = ("chatml", "llama-3", "alpaca", "plain")
ALIKE = ("chatml", "default-system", "strips", "dated", "no-system")


def _bos(tokenizer: ChatTokenizer) -> str:
    return tokenizer.special_tokens["bos_token"]


def _compare(tokenizer: ChatTokenizer, **settings: bool) -> str:
    """Compare on conversations of this file, which are not those of the program; return the template."""
    adds_bos = settings.get("adds_bos", False)
    template = ollama_template(tokenizer, "auto", adds_bos=adds_bos).text
    assert template
    for turns in (ONE, THREE, FIVE):
        for conversation in (turns, [SYSTEM, *turns]):
            expected = prompt_text(conversation, tokenizer)
            if adds_bos:
                expected = expected.removeprefix(_bos(tokenizer))
            assert render_go_template(template, conversation) == expected
    return template


@pytest.mark.parametrize("stock", STOCK)
def test_each_stock_template_has_one_that_renders_alike(stock: str) -> None:
    _compare(tokenizer_for("", stock))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in ALIKE])
def test_a_template_of_a_family_has_one_that_renders_alike(name: str) -> None:
    _compare(tokenizer_for(FAMILIES[name]))


def test_ollama_adds_the_begin_token_or_the_template_does() -> None:
    tokenizer = tokenizer_for("{{- bos_token -}}" + FAMILIES["chatml"])
    assert _compare(tokenizer).startswith(_bos(tokenizer))
    assert _bos(tokenizer) not in _compare(tokenizer, adds_bos=True)


def test_a_default_system_prompt_is_written_only_without_another() -> None:
    template = _compare(tokenizer_for(FAMILIES["default-system"]))
    assert template.startswith("{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}")


def test_a_template_that_trims_says_what_differs() -> None:
    assert "removes spaces" in ollama_template(tokenizer_for("", "llama-3"), "auto", adds_bos=False).note
    assert not ollama_template(tokenizer_for("", "chatml"), "auto", adds_bos=False).note


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FAMILIES["moves-system"], "moves a message"),
        (FAMILIES["opens-thinking"], "thinks"),
        ("{%- for m in messages -%}{{- m.content + loop.index|string -}}{%- endfor -%}", "first turns"),
        (
            "{%- for m in messages -%}{{- '<' + m.role + '>' + m.content|upper + '\\n' -}}{%- endfor -%}",
            "leaves out",
        ),
        (
            "{%- for m in messages -%}{{- '<' + m.role + '>' + m.content|replace('?', '!') + '\\n' -}}"
            "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}",
            "from turn to turn",
        ),
    ],
)
def test_a_template_that_cannot_be_written_has_a_reason(template: str, reason: str) -> None:
    result = ollama_template(tokenizer_for(template), "auto", adds_bos=False)
    assert not result.text
    assert reason in result.reason


@pytest.mark.parametrize("text", ['say """no"""', "{{ if }}", "\u200b\U000e0001", "a\n\tb", "back\\slash"])
def test_a_literal_is_written_as_it_is(text: str) -> None:
    source = go_literal(text)
    assert render_go_template(source, ONE) == text
    assert '"""' not in source
    # Ollama's parser drops what is not printable.
    assert all(character.isprintable() or character in "\n\t" for character in source)


@pytest.mark.parametrize(
    "source", ["{{ end }}", "{{ if .System }}", "{{ .Tools }}", "{{ range .Messages }}", "{{ template }}"]
)
def test_an_unknown_construct_is_an_error(source: str) -> None:
    with pytest.raises(ValueError):
        render_go_template(source, ONE)
