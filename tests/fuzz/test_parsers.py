"""No damage to a file of any kind is a traceback: it is read, or refused with a UserError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui import paths
from qlora_tui.catalog import model_validation
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_config import to_hf_config
from qlora_tui.catalog.model_validation import tensor_entries
from qlora_tui.data.chat_template import ChatTemplate, TemplateCompileError
from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.inspection import inspect
from qlora_tui.data.problems import CHECKS
from qlora_tui.data.render import render
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.recipe import presets, toml
from qlora_tui.recipe.layering import parse_override
from qlora_tui.recipe.schema import Source
from qlora_tui.runs import control, events
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Failed, Health, Queued
from qlora_tui.runs.status import read_status
from qlora_tui.runs.telemetry import TelemetryTail
from qlora_tui.settings import config_path, load_settings
from qlora_tui.tui.themes import load_themes
from tests.catalog.models import TINY, TINY_GGUF_TENSORS, TINY_GGUF_VALUES, gguf_bytes, safetensors_bytes
from tests.data.families import CHATML, FAMILIES, family, tokenizer_json
from tests.fuzz.damage import damaged, mistyped
from tests.fuzz.data_files import SEEDS

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
CORPUS = Path(__file__).with_name("corpus")
CONVERSATION = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Parse = Callable[[Path], object]
"""Reads whatever was written to the path it is given; the folder around it is its own."""


def _recipe(path: Path) -> object:
    return toml.to_recipe(toml.load(path))


def _preset(path: Path) -> object:
    folder = paths.user_presets_dir()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.toml").write_bytes(path.read_bytes())
    return [preset.problem for preset in presets.list_presets()]


def _settings(path: Path) -> object:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_bytes(path.read_bytes())
    return load_settings()


def _theme(path: Path) -> object:
    folder = paths.user_themes_dir()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.toml").write_bytes(path.read_bytes())
    return load_themes()


def _set(path: Path) -> object:
    return parse_override(path.read_bytes().decode("utf-8", "surrogateescape"))


def _config(path: Path) -> object:
    (path.parent / "config.json").write_bytes(path.read_bytes())
    (path.parent / "model.safetensors").write_bytes(safetensors_bytes())
    _, refusal = model_validation.check_folder(path.parent, "it")
    return refusal or parse_architecture(path.parent)


def _gguf(path: Path) -> object:
    return parse_architecture(to_hf_config(read_gguf(path), path))


def _safetensors(path: Path) -> object:
    with suppress(ValueError):
        return tensor_entries(path)
    return None


def _index(path: Path) -> object:
    (path.parent / model_validation.INDEX).write_bytes(path.read_bytes())
    return model_validation.weight_files(path.parent)


def _tokenizer(name: str) -> Parse:
    def parse(path: Path) -> object:
        (path.parent / "tokenizer.json").write_text(tokenizer_json())
        (path.parent / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
        (path.parent / name).write_bytes(path.read_bytes())
        try:
            return render(CONVERSATION, ChatTokenizer.from_folder(path.parent))
        except RowRejectedError as refused:
            return refused.reason

    return parse


def _template(path: Path) -> object:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
        return ChatTemplate(text, {}).render([{"role": "user", "content": "Hi"}], prompt=True)
    except (TemplateCompileError, RowRejectedError) as refused:
        return str(refused)


def _run(path: Path, name: str) -> RunDir:
    run = RunDir(path.parent)
    run.recipe_path.write_text("")
    run.events_path.write_bytes(events.encode(Queued(at=1.0)))
    (path.parent / name).write_bytes(path.read_bytes())
    return run


def _events(path: Path) -> object:
    read = [events.decode(line) for line in path.read_bytes().splitlines()]
    return read, read_status(_run(path, "events.jsonl"))


def _status(path: Path) -> object:
    return read_status(_run(path, "status.json"))


def _control(path: Path) -> object:
    run = _run(path, "events.jsonl")
    run.control_dir.mkdir(exist_ok=True)
    (run.control_dir / "1.json").write_bytes(path.read_bytes())
    return control.take_requests(run)


PARSERS: dict[str, tuple[list[bytes], Parse]] = {
    "recipe": ([toml.dump(toml.to_recipe({}), comments=True).encode()], _recipe),
    "preset": ([paths.shipped_dir("presets").joinpath("paper.toml").read_bytes()], _preset),
    "settings": (
        [b'theme = "ember"\ncard_gib = 24\n[keymap]\n"go.home" = "h"\n[notify]\nbell = true\n'],
        _settings,
    ),
    "theme": ([paths.shipped_dir("themes").joinpath("ember.toml").read_bytes()], _theme),
    "set": (
        [b"lora.rank=8", b"lora.rank_pattern=q_proj=32,8-23.v_proj=8", b"data.sources=[{path='a'}]"],
        _set,
    ),
    "config.json": ([json.dumps(TINY).encode()], _config),
    "gguf": ([gguf_bytes(TINY_GGUF_VALUES, TINY_GGUF_TENSORS)], _gguf),
    "safetensors": ([safetensors_bytes()], _safetensors),
    "index": ([b'{"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}'], _index),
    "tokenizer.json": ([tokenizer_json().encode()], _tokenizer("tokenizer.json")),
    "tokenizer_config.json": (
        [
            json.dumps(
                {"chat_template": CHATML, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
            ).encode(),
            json.dumps({"chat_template": [{"name": "default", "template": CHATML}]}).encode(),
            b'{"added_tokens_decoder": {"1000": {"content": "<x>", "special": true}}}',
        ],
        _tokenizer("tokenizer_config.json"),
    ),
    "chat_template.jinja": ([text.encode() for text in FAMILIES.values()], _tokenizer("chat_template.jinja")),
    "template": ([text.encode() for text in FAMILIES.values()], _template),
    "events": (
        [
            events.encode(Queued(at=1.0)) + events.encode(Failed(at=2.0, title="a", what="b", kind="bug")),
            events.encode(
                Health(at=1.0, kind="nan_loss", severity="error", evidence="a", remedy="b", step=3)
            ),
        ],
        _events,
    ),
    "status": ([b'{"state":"finished","at":4.0,"step":3,"total_steps":3,"loss":2.5}'], _status),
    "telemetry": (
        [b'{"at":1.0,"rss_bytes":3,"cpu_percent":5.0}\n' * 3],
        lambda path: TelemetryTail(path).poll(),
    ),
    "control": ([b'{"kind":"checkpoint"}', b'{"kind":"set_learning_rate","value":0.1}'], _control),
}

JSON_PARSERS = (
    "tokenizer.json",
    "config.json",
    "index",
    "tokenizer_config.json",
    "events",
    "status",
    "control",
)


@pytest.mark.parametrize("name", PARSERS)
@fuzzed
@given(data=st.data())
def test_damage_is_read_or_refused(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole, parse = PARSERS[name]
    content = data.draw(damaged([*whole, *corpus(name)]))
    path = tmp_path_factory.mktemp("damaged") / "file"
    path.write_bytes(content)
    read_or_refused(parse, path)


@pytest.mark.parametrize("name", JSON_PARSERS)
def test_a_value_of_a_wrong_type_is_read_or_refused(name: str, tmp_path: Path) -> None:
    wholes, parse = PARSERS[name]
    number = 0
    for whole in wholes:
        for which, content in mistyped(whole.splitlines()[0]):
            number += 1
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "file").write_bytes(content)
            try:
                read_or_refused(parse, folder / "file")
            except Exception as error:
                error.add_note(which)
                raise


@pytest.mark.parametrize("name", SEEDS)
@fuzzed
@given(data=st.data())
def test_damaged_data_is_read_or_refused(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data.draw(damaged([SEEDS[name]])))
    try:
        report = inspect(Source(path=str(path)), data.draw(st.sampled_from((None, family("chatml")))))
    except UserError as problem:
        assert str(path) in problem.what and problem.title and problem.fix
        return
    for finding in report.problems:
        assert finding.kind in CHECKS and finding.example
        assert finding.rows and min(finding.rows) >= 1


@pytest.mark.parametrize("name", sorted(folder.name for folder in CORPUS.iterdir()))
def test_what_once_failed_is_read_or_refused(name: str, tmp_path: Path) -> None:
    for number, content in enumerate(corpus(name)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_bytes(content)
        read_or_refused(PARSERS[name][1], folder / "file")


def read_or_refused(parse: Parse, path: Path) -> None:
    """Fail for anything but a result or a UserError with words."""
    try:
        parse(path)
    except UserError as problem:
        assert problem.title
        assert problem.what


def corpus(name: str) -> list[bytes]:
    """Inputs that failed once."""
    return [file.read_bytes() for file in sorted((CORPUS / name).glob("*"))]
