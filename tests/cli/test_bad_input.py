"""What a user can get wrong is answered: what, why, what to do. Exit code 1 or 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_tui import paths
from qlora_tui.runs.directory import all_runs
from qlora_tui.settings import config_path
from tests.cli.conftest import Call
from tests.support.tiny_gguf import write_tiny_gguf
from tests.tui.sample_data import readable_model


@pytest.fixture
def readable(private_home: Path) -> Path:
    """A model with a tokenizer, and no weights that anything here would read."""
    return Path(readable_model(private_home))


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[lora]\nrnak = 8", ["lora.rnak", "line 2", "lora.rank"]),
        ("rank = 8", ["rank", "[lora]"]),
        ('[lora]\nrank = "eight"', ["lora.rank", "line 2", "a whole number from 1 to 1,024"]),
        ("[lora]\nrank = 0", ["lora.rank", "from 1 to 1,024"]),
        ("[training]\nlr_scheduler = 'cosin'", ["training.lr_scheduler", "cosine"]),
        ("[lora\nrank = 8", ["line 1"]),
    ],
)
def test_a_wrong_recipe_names_file_line_key_and_expected_value(
    text: str, words: list[str], tmp_path: Path, call: Call
) -> None:
    said = call("train", recipe_file(tmp_path, text), "--detach")
    assert said.code == 2
    assert "mine.toml" in said.err
    for word in words:
        assert word in said.err
    assert all_runs() == []


@pytest.mark.parametrize("words", [["--set", "lora.rnak=3"], ["--set", "lora.rank"], ["--preset", "blanced"]])
def test_a_wrong_option_is_answered_with_the_near_match(words: list[str], call: Call) -> None:
    said = call("train", *words)
    assert said.code == 2
    assert "lora.rank" in said.err or "balanced" in said.err


def test_a_model_folder_with_pickled_weights_only(call: Call, qwen: Path) -> None:
    (qwen / "pytorch_model.bin").write_bytes(b"pickle")
    data = qwen.parent / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    said = call("train", "--model", str(qwen), "--data", str(data))
    assert said.code in (1, 2)
    assert "safetensors" in said.err
    assert all_runs() == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\xff\xfe\xfa{}\n", ["UTF-8"]),
        (b'{"prompt": "a", "completion": "b"}\n' * 6 + b"{oops\n", ["Line 7"]),
        (b'{"colour": "red"}\n', ["colour"]),
    ],
)
def test_a_data_file_that_cannot_be_used(
    content: bytes, words: list[str], call: Call, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    said = call("data", "inspect", str(path))
    assert said.code in (1, 2)
    for word in words:
        assert word in said.err + said.out


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["lora.target_modules=nope", "lora.trainable_tokens=nope"])
def test_targets_the_model_lacks_are_rejected_before_queueing(
    call: Call, readable: Path, tmp_path: Path, setting: str
) -> None:
    data = tmp_path / "owls.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    said = call("train", "--model", str(readable), "--data", str(data), "--set", setting)
    assert said.code == 2 and "nope" in said.err
    assert not list(paths.runs_dir().iterdir())


@pytest.mark.slow
def test_a_row_that_blocks_a_run_is_rejected_before_queueing(
    call: Call, readable: Path, tmp_path: Path
) -> None:
    data = tmp_path / "owls.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    data.write_text(good * 300 + "{bad\n")
    words = ("train", "--model", str(readable), "--data", str(data), "--print-command")
    said = call(*words)
    assert said.code == 1
    assert "owls.jsonl, row 301" in said.err and "Correct or remove the line" in said.err
    assert all_runs() == []
    data.write_text(good * 300)
    said = call(*words)
    assert said.code == 0 and "the run starts" not in said.err


PREFERENCES = '{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n'


@pytest.mark.slow
def test_every_command_rejects_preferences_until_the_user_chooses(
    call: Call, readable: Path, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(PREFERENCES)
    of_model = ("--model", str(readable))
    choice = ("--set", "data.preferences=chosen")
    for words in (
        ("data", "inspect", str(data)),
        ("data", "show", str(data), *of_model),
        ("estimate", *of_model, "--data", str(data)),
        ("train", *of_model, "--data", str(data), "--print-command"),
    ):
        said = call(*words)
        assert said.code == 1 and said.out == ""
        assert "Preference data: " in said.err and str(data) in said.err
        assert "the rejected answers would be ignored" in said.err
        assert "--set data.preferences=chosen" in said.err
        assert call(*words, *choice).code == 0
    assert "That." not in call("data", "show", str(data), *of_model, *choice).out


def test_a_refusal_of_data_is_an_object_with_json(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(PREFERENCES)
    said = call("data", "inspect", str(data), "--json")
    assert said.code == 1 and "Preference data" in said.err
    assert said.json["error"]["title"] == "Preference data"
    assert set(said.json["error"]) == {"title", "what", "why", "fix", "code"}
    said = call("data", "inspect", str(data), "--json", "--set", "data.preferences=chosen")
    assert said.code == 0 and said.json["files"][0]["format"] == "preference"


@pytest.mark.slow
def test_what_data_is_asked_is_checked_like_a_recipe(call: Call, readable: Path, tmp_path: Path) -> None:
    data = tmp_path / "owls.jsonl"
    data.write_text('{"prompt": "a long question of many words", "completion": "and its answer"}\n')
    said = call("data", "inspect", str(data), "--model", str(readable), "--template", "bogus")
    assert said.code == 2 and "chatml" in said.err
    assert call("data", "show", str(data), "--model", str(readable), "--row", "0").code == 2
    assert call("data", "inspect", str(data), "--max-length", "-5").code == 2
    cut = call("data", "show", str(data), "--model", str(readable), "--max-length", "4")
    assert cut.code == 0 and "Nothing is left to learn within 4 tokens" in cut.out


@pytest.mark.slow
def test_tokens_of_a_gguf_file_are_counted(tmp_path: Path, call: Call) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\nHi,Hello there\nYou?,Fine\n")
    assert "length in tokens" in call("data", "inspect", str(rows), "--model", str(file)).out
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"))
    said = call("data", "inspect", str(rows), "--model", str(damaged))
    assert said.code == 1 and "tokenizer.ggml.merge" in said.err


LONG = "a" * 90_000


@pytest.mark.parametrize(
    "words",
    [
        ["estimate", "--set", f"model.id={LONG}"],
        ["estimate", "--model", LONG],
        ["estimate", "--model", "{qwen}", "--set", f"data.sources={LONG}"],
        ["estimate", "--model", "{qwen}", "--data", "b" * 256],
        ["estimate", "--model", "{qwen}", "--set", f"name={LONG}"],
        ["estimate", "--set", f"{LONG}=1"],
        ["estimate", "--set", f"lora.rank={'9' * 10_000}"],
        ["data", "inspect", LONG],
    ],
)
def test_an_overlong_argument_is_refused_in_a_few_lines(call: Call, qwen: Path, words: list[str]) -> None:
    said = call(*(word.format(qwen=qwen) for word in words))
    assert said.code in (1, 2)
    assert "mistake" not in said.err
    assert len(said.err) < 1000


def test_a_binary_preset_is_rejected_with_its_line(call: Call) -> None:
    (paths.user_presets_dir() / "bad.toml").write_bytes(b'name = "bad"\nnote = "\xff"\n')
    for words in (["presets", "show", "bad"], ["estimate", "--preset", "bad"]):
        said = call(*words)
        assert said.code == 2
        assert "bad.toml: line 2 is not UTF-8 text" in said.err
    assert "line 2 is not UTF-8 text" in call("presets").out


@pytest.mark.parametrize("depth", ["", "../", "../../../"])
@pytest.mark.parametrize(
    "words", ["presets show", "attach", "resume", "stop", "runs delete", "runs check", "chat", "export lora"]
)
def test_no_name_leads_out_of_its_folder(words: str, depth: str, private_home: Path, call: Call) -> None:
    secret = private_home / "state" / "qlora-tui" / "secret.toml"
    secret.parent.mkdir(parents=True)
    secret.write_text('name = "SECRET-CONTENT"\n')
    for name in (f"{depth}secret", f"{depth}secret.toml", str(secret)[:-5], str(secret), "..", "."):
        said = call(*words.split(), name)
        assert said.code in (1, 2) and "SECRET-CONTENT" not in said.out + said.err
    assert secret.exists()


def test_the_list_of_runs_says_that_the_settings_cannot_be_read(call: Call) -> None:
    config_path().write_text('hours = "at night"\n')
    said = call("runs")
    assert said.code == 0 and "config.toml: hours: at is neither a day" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_internal_error(closed: str) -> None:
    shell = f"{sys.executable} -m qlora_tui runs {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert not paths.log_path().exists()


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_moves_no_cursor_is_said(
    call: Call, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    said = call()
    assert said.code == 2 and f"TERM is {term or 'empty'}" in said.err


def test_an_argument_that_is_not_utf8_is_said(call: Call) -> None:
    said = call("models", "r\udcff")
    assert said.code == 2 and "An argument is not UTF-8: r⟨U+DCFF⟩" in said.err
