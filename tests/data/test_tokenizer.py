from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.chat_template import ChatTemplate
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.render import render
from qlora_tui.data.tokenizer import OWN, ChatTokenizer
from qlora_tui.errors import UserError
from tests.data.conversation_shapes import TOOL, assistant, user
from tests.data.families import CHATML, PARTS, STRIPS, TOOLS, family, tokenizer_json


def folder(tmp_path: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **(config or {})}))
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/").replace("_jinja", ".jinja").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    read = ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS}, chat_template_jinja=CHATML))
    assert (read.template.text, read.template_name, read.has_own_template) == (CHATML, OWN, True)


def test_templates_in_a_config_or_processor_file_are_read(tmp_path: Path) -> None:
    assert ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS})).template.text == STRIPS
    processor = folder(tmp_path, chat_template_json=json.dumps({"chat_template": CHATML}))
    assert ChatTokenizer.from_folder(processor).template.text == CHATML


@pytest.mark.parametrize("place", ["list", "folder"])
def test_a_template_for_tools_is_used_for_conversations_with_tools(tmp_path: Path, place: str) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    if place == "list":
        model_folder = folder(tmp_path, {"chat_template": named})
    else:
        model_folder = folder(
            tmp_path, chat_template_jinja=CHATML, additional_chat_templates__tool_use_jinja=TOOLS
        )
    tokenizer = ChatTokenizer.from_folder(model_folder)
    turns = (user("a"), assistant("b"))
    plain, with_tools = (
        render(Conversation(turns), tokenizer)[0],
        render(Conversation(turns, (TOOL,)), tokenizer)[0],
    )
    assert "get_weather" not in tokenizer.decode(plain.token_ids)
    assert "get_weather" in tokenizer.decode(with_tools.token_ids)
    assert with_tools.notes == ()


def test_a_template_file_replaces_those_of_the_config(tmp_path: Path) -> None:
    named = [{"name": "default", "template": STRIPS}, {"name": "tool_use", "template": TOOLS}]
    tokenizer = ChatTokenizer.from_folder(
        folder(tmp_path, {"chat_template": named}, chat_template_jinja=CHATML)
    )
    assert tokenizer.template.text == CHATML and tokenizer.tool_template is tokenizer.template


def test_special_tokens_are_read_in_every_spelling(tmp_path: Path) -> None:
    model_folder = folder(
        tmp_path,
        {
            "bos_token": {"content": "<s>", "lstrip": False},
            "unk_token": None,
            "extra_special_tokens": {"x_token": "<User>"},
        },
        special_tokens_map_json=json.dumps({"pad_token": "<|endoftext|>", "eos_token": "<s>"}),
    )
    tokenizer = ChatTokenizer.from_folder(model_folder)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>", "x_token": "<User>",
    }  # fmt: skip
    assert tokenizer.decode([tokenizer.eos_id or 0]) == "</s>"
    assert tokenizer.pad_id == tokenizer.added_tokens["<|endoftext|>"]


def test_tokens_only_the_config_declares_are_added(tmp_path: Path) -> None:
    size = family("chatml").backend.get_vocab_size()
    extra = {str(size): {"content": "<|extra|>", "special": True}}
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path, {"added_tokens_decoder": extra}))
    assert tokenizer.encode("a<|extra|>")[-1] == size
    assert size in tokenizer.special_ids


@pytest.mark.parametrize(("stock", "name"), [("auto", "chatml"), ("alpaca", "alpaca")])
def test_a_base_model_gets_a_stock_template_to_save(tmp_path: Path, stock: str, name: str) -> None:
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path), stock)
    assert (tokenizer.template_name, tokenizer.has_own_template) == (name, False)
    again = ChatTokenizer.from_folder(folder(tmp_path, chat_template_jinja=tokenizer.template.text))
    turns = Conversation((user("a"), assistant("b")))
    assert render(turns, again) == render(turns, tokenizer)


def test_a_stock_template_can_be_chosen_over_the_models_own(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": STRIPS}), "plain")
    assert tokenizer.template_name == "plain"


def test_the_fingerprint_changes_with_whatever_changes_tokens(tmp_path: Path) -> None:
    configs = (
        {"chat_template": CHATML},
        {"chat_template": STRIPS},
        {"chat_template": CHATML, "bos_token": "<s>"},
    )
    prints = {ChatTokenizer.from_folder(folder(tmp_path, config)).fingerprint for config in configs}
    assert len(prints) == 3
    assert ChatTokenizer.from_folder(folder(tmp_path, {"chat_template": CHATML})).fingerprint in prints


@pytest.mark.parametrize(
    ("file", "content", "title"),
    [
        ("tokenizer.json", None, "No tokenizer"),
        ("tokenizer.json", "{}", "Broken tokenizer"),
        ("tokenizer.json", "not json", "Broken tokenizer"),
        ("tokenizer_config.json", "{oops", "Broken tokenizer"),
        ("chat_template.jinja", "{% if %}", "Broken chat template"),
    ],
)
def test_a_broken_model_folder_says_what_is_broken(
    tmp_path: Path, file: str, content: str | None, title: str
) -> None:
    model_folder = folder(tmp_path)
    if content is None:
        (model_folder / file).unlink()
    else:
        (model_folder / file).write_text(content)
    with pytest.raises(UserError, match=title) as caught:
        ChatTokenizer.from_folder(model_folder)
    assert caught.value.fix


def test_an_older_tokenizer_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(UserError, match="No tokenizer") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert "AutoTokenizer" in caught.value.fix


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    held = json.loads(tokenizer_json())
    held["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    held["padding"] = {"strategy": {"Fixed": 64}, **padding}
    model_folder = folder(tmp_path)
    (model_folder / "tokenizer.json").write_text(json.dumps(held))
    ids = ChatTokenizer.from_folder(model_folder).encode("the answer is a small wild dog")
    assert len(ids) == len(family("chatml").encode("the answer is a small wild dog"))


def test_what_a_template_can_say_is_found_by_trying() -> None:
    assert family("chatml").traits.system
    assert not family("no-system").traits.system
    assert family("parts").traits.parts
    assert not family("chatml").traits.parts
    assert (family("tools").traits.tools, family("tools").traits.calls) == (True, "object")
    assert family("chatml").traits.calls == "text"
    assert family("drops-thinking").traits.reasoning
    assert not family("opens-thinking").traits.reasoning


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_is_kept_in_its_sandbox(text: str) -> None:
    with pytest.raises(RowRejectedError):
        ChatTemplate(text, {}).render([{"role": "user", "content": "a"}])


def test_a_template_that_fails_says_how() -> None:
    with pytest.raises(RowRejectedError, match="TypeError"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([{"role": "user", "content": "a"}])
    with pytest.raises(RowRejectedError, match="The template says: No\\."):
        ChatTemplate("{{ raise_exception('No.') }}", {}).render([])


def test_content_in_parts_reaches_a_template_that_wants_it() -> None:
    assert ChatTemplate(PARTS, {}).text == PARTS
    sample = render(Conversation((user("a"), assistant("b"))), family("parts"))[0]
    assert family("parts").decode(sample.token_ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_released_caches_change_no_ids() -> None:
    tokenizer = family("chatml")
    texts = ["the owl sees the fox", "a <|im_end|> in the text"]
    before = [tokenizer.encode(text) for text in texts]
    inside = tokenizer.encode_inside(texts[1], literal=True)
    marked = tokenizer.encode_marked(texts, [[], []])
    tokenizer.release_caches()
    assert "_without_added" not in vars(tokenizer) and "_words" not in vars(tokenizer)
    assert [tokenizer.encode(text) for text in texts] == before
    assert tokenizer.encode_inside(texts[1], literal=True) == inside
    assert tokenizer.encode_marked(texts, [[], []]) == marked
