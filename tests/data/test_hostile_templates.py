"""Chat templates by third parties are bounded in time and memory, and their errors are explained."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

from qlora_tui.data import chat_template
from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError
from qlora_tui.data.confined import Confined
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.render import prompt_ids, render
from tests.data.families import CHATML, tokenizer_for

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    "{show}"
)
SLOW = {
    "loops": ENDLESS,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{{ ([range(99999)] * 99999) | map('sum') | sum }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "sum of lists": "{{ ([[0] * 2000] * 20000) | sum(start=[]) | length }}",
    "comparison": "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "hash": "{% set ns = namespace(a=(0,)) %}{% for i in range(60) %}"
    "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
}
LARGE = {
    "width of %": "{{ '%0999999999d' % 1 }}",
    "width of a filter": "{{ '%0999999999d' | format(1) }}",
    "width of format": "{{ '{:0999999999d}'.format(1) }}",
    "sum of texts": GROWING.format(start="'ab'", step="ns.x + ns.x", show="{{ ns.x }}"),
    "joined texts": GROWING.format(start="'ab'", step="ns.x ~ ns.x", show="{{ ns.x }}"),
    "repeated text": "{{ 'a' * 9999999999 }}",
    "repeated list": "{{ [1] * 9999999999 }}",
    "lists in lists": GROWING.format(start="[1]", step="[ns.x, ns.x]", show="{{ ns.x }}"),
    "json of lists": GROWING.format(start="[1]", step="[ns.x, ns.x]", show="{{ ns.x | tojson }}"),
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "center": "{{ 'a' | center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "tabs": "{{ '\t'.expandtabs(9999999999) }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "indent of json": "{{ messages | tojson(indent=999999999) }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "join": "{{ ('a' * 99999) | join('b' * 99999) }}",
    "batch": "{{ [1] | batch(9999999999, 1) | list | length }}",
}
FAILING = {
    "of a variable": "{{ nothing.at.all }}",
    "of an index": "{{ messages[9].content }}",
    "of a call": "{{ messages() }}",
    "of recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "of its own": "{{ raise_exception('no') }}",
    "of half a character": "{{ messages[0].content ~ '\\ud800' }}",
}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[Confined]:
    """End a rendering after a tenth of a second, which is what the test then takes, or at 32 MiB."""
    child = Confined("qlora_tui.data.chat_template", cpu_s=0.1, memory_bytes=32 << 20)
    monkeypatch.setattr(chat_template, "_renderer", child)
    yield child
    child.close()


def refusal(text: str) -> str:
    """Why the template gives nothing, compiled or rendered."""
    try:
        with pytest.raises(RowRejectedError) as refused:
            ChatTemplate(text, {}).render(TURNS)
        return refused.value.reason
    except TemplateCompileError as broken:
        return str(broken)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", SLOW)
def test_a_template_without_end_is_stopped(name: str) -> None:
    assert "takes more than 0.1 seconds" in refusal(SLOW[name])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.slow
def test_a_template_that_takes_all_memory_is_stopped(name: str) -> None:
    assert re.search("takes more than|Error", refusal(LARGE[name]))


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_told_in_words(name: str) -> None:
    assert refusal(FAILING[name]).startswith("The template ")


def test_a_template_that_was_stopped_is_not_tried_again(
    brief: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = ChatTemplate(SLOW["loops"], {})
    with pytest.raises(RowRejectedError):
        endless.render(TURNS)
    monkeypatch.setattr(brief, "call", None)
    for tried in (endless, endless.with_variables({"enable_thinking": False})):
        with pytest.raises(RowRejectedError, match="takes more than"):
            tried.render(TURNS)


def test_a_template_that_exhausts_memory_thrice_is_not_tried_again(
    brief: Confined, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, reasons = ChatTemplate("{{ 'a' * 9999999999 }}", {}), set()
    for number in range(4):
        if number == 3:
            monkeypatch.setattr(brief, "call", None)
        with pytest.raises(RowRejectedError) as refused:
            template.render(TURNS)
        reasons.add(refused.value.reason)
    assert reasons == {"The template takes more than 32 MiB for one conversation."}


def test_other_templates_are_rendered_after_one_was_killed(brief: Confined) -> None:
    good = ChatTemplate(CHATML, {})
    expected, first_pid = good.render(TURNS), brief.pid
    refusal(SLOW["loops"])
    assert good.render(TURNS) == expected
    assert brief.pid not in (None, first_pid)


def test_threads_take_turns(brief: Confined) -> None:
    good = ChatTemplate(CHATML, {})
    threads = [threading.Thread(target=refusal, args=(SLOW["loops"],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    rendered = {good.render(TURNS) for _ in range(100)}
    for thread in threads:
        thread.join()
    assert len(rendered) == 1


@pytest.mark.parametrize("text", ["hello", "{{ bos_token }}", "{% for m in messages %}{% endfor %}"])
def test_a_template_that_ignores_its_messages_is_refused_in_words(text: str) -> None:
    tokenizer = tokenizer_for(text)
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
    with pytest.raises(RowRejectedError, match="omits the assistant's turns"):
        render(conversation, tokenizer)
    prompt_ids([Message("user", "Hi")], tokenizer)
