"""Chat templates by third parties are bounded in time and memory, and their errors are explained."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest

from qlora_tui.data import chat_template, template_guard
from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError
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
}
HANGING = {
    "comparison": "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "hash": "{% set ns = namespace(a=(0,)) %}{% for i in range(60) %}"
    "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} | length }}",
}
"""What no other thread can interrupt."""
RENDERED_ALONE = """
import sys
from qlora_tui.data import chat_template, template_guard
template_guard.MAX_HUNG_CPU_S = template_guard.MAX_CPU_S = float(sys.argv[3])
template, rounds = chat_template.ChatTemplate(sys.argv[1], {}), int(sys.argv[2])
for _ in range(rounds):
    template.render([{"role": "user", "content": "Hi"}])
"""
RENDERED_THEN_PROFILED = """
import sys
from qlora_tui.data import chat_template, template_guard
from qlora_tui.data.conversation import RowRejectedError
template_guard.MAX_CPU_S = template_guard._LOOK_S = 0.02
try:
    chat_template.ChatTemplate(sys.argv[1], {}).render([{"role": "user", "content": "Hi"}])
except RowRejectedError:
    print("stopped")
sys.setprofile(lambda *event: None)
print((lambda: "profiled")())
"""
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
NUMBERS = {
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": GROWING.format(start="9", step="ns.x * ns.x", show="{{ ns.x > 1 }}"),
    "parsed": "{{ ('f' * 9999) | int(base=16) // 3 }}",
    "from bytes": "{{ (1).from_bytes(('a' * 9999).encode(), 'little') // 3 }}",
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
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a rendering after a few hundredths of a second, which is what the test then takes."""
    monkeypatch.setattr(template_guard, "MAX_CPU_S", 0.03)
    monkeypatch.setattr(template_guard, "_LOOK_S", 0.01)


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
    assert "takes more than" in refusal(SLOW[name])


def rendered_alone(text: str, rounds: int = 1, limit_s: float = 0.2) -> subprocess.CompletedProcess[str]:
    """A finished process that rendered this template ``rounds`` times."""
    return subprocess.run(
        [sys.executable, "-c", RENDERED_ALONE, text, str(rounds), str(limit_s)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", HANGING)
def test_a_template_stuck_in_one_operation_ends_its_process(name: str) -> None:
    done = rendered_alone(HANGING[name])
    assert done.returncode == -template_guard.HANG_SIGNAL
    assert "the model's chat template" in done.stderr


@pytest.mark.slow
def test_rendering_for_long_is_no_hanging() -> None:
    done = rendered_alone(
        "{% for m in messages %}{{ m.content * 1000 }}{% endfor %}", rounds=100_000, limit_s=0.5
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("template", "output"), [("{{ messages[0].content }}", "profiled\n"), (ENDLESS, "stopped\nprofiled\n")]
)
@pytest.mark.slow
def test_code_after_a_rendering_can_be_profiled(template: str, output: str) -> None:
    """With the interpreter's flag for an exception of a thread set, Python 3.11 hangs under a profiler."""
    done = subprocess.run(
        [sys.executable, "-c", RENDERED_THEN_PROFILED, template],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout == output


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.slow
def test_a_template_that_takes_all_memory_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_guard, "MAX_CPU_S", 1.0)
    monkeypatch.setattr(template_guard, "MAX_ADDED_MEMORY_BYTES", 32 << 20)
    assert re.search("takes more than|Error", refusal(LARGE[name]))


@pytest.mark.parametrize("name", NUMBERS)
def test_arithmetic_that_nothing_can_end_is_refused(name: str) -> None:
    assert "more than 4,096 bits" in refusal(NUMBERS[name])


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_told_in_words(name: str) -> None:
    assert refusal(FAILING[name]).startswith("The template ")


@pytest.mark.usefixtures("brief")
def test_a_template_that_was_stopped_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ChatTemplate(ENDLESS, {})
    for tried in (endless, endless, endless.with_variables({"enable_thinking": False})):
        with pytest.raises(RowRejectedError):
            tried.render(TURNS)
        monkeypatch.setattr(template_guard, "MAX_CPU_S", 1e9)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("fault", [MemoryError, OSError, None], ids=["memory", "clock", "lost"])
def test_a_template_is_stopped_where_the_first_attempt_fails(
    fault: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watching thread has no memory or clock at first, or Python drops the exception."""
    calls: list[object] = []
    raise_in = template_guard._raise_in

    def fails_once(thread: object, exception: object) -> object:
        calls.append(exception)
        if len(calls) != 1:
            return raise_in(thread, exception)
        if fault is not None:
            raise fault
        return 1

    monkeypatch.setattr(template_guard, "_raise_in", fails_once)
    assert "takes more than" in refusal(ENDLESS)


@pytest.mark.usefixtures("brief")
def test_a_template_is_stopped_after_the_watcher_failed_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_guard, "_watch", template_guard._Watch())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", _cannot_start)
        template_guard.Bounded().__enter__()
    assert "takes more than" in refusal(ENDLESS)


def _cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_template_that_exhausts_memory_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_guard, "MAX_CPU_S", 1e9)
    monkeypatch.setattr(template_guard, "MAX_ADDED_MEMORY_BYTES", 32 << 20)
    monkeypatch.setattr(chat_template, "_MAX_WASTED_S", 0.0)
    template = ChatTemplate(LARGE["sum of texts"], {})
    reasons = []
    for _ in range(2):
        with pytest.raises(RowRejectedError) as refused:
            template.render(TURNS)
        reasons.append(refused.value.reason)
        monkeypatch.setattr(template_guard, "MAX_ADDED_MEMORY_BYTES", 1 << 62)
    assert reasons[0] == reasons[1] and "takes more than" in reasons[0]


@pytest.mark.usefixtures("brief")
def test_a_template_is_stopped_in_its_own_thread_only() -> None:
    reasons: list[str] = []
    thread = threading.Thread(target=lambda: reasons.append(refusal(ENDLESS)))
    thread.start()
    while thread.is_alive():
        assert ChatTemplate(CHATML, {}).render(TURNS)
    assert "takes more than" in reasons[0]


@pytest.mark.parametrize("text", ["hello", "{{ bos_token }}", "{% for m in messages %}{% endfor %}"])
def test_a_template_that_ignores_its_messages_is_refused_in_words(text: str) -> None:
    tokenizer = tokenizer_for(text)
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
    with pytest.raises(RowRejectedError, match="omits the assistant's turns"):
        render(conversation, tokenizer)
    prompt_ids([Message("user", "Hi")], tokenizer)


def test_the_reason_of_the_time_bound_names_it() -> None:
    assert "5 seconds" in chat_template._TOO_SLOW
