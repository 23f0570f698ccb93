"""``export ollama``: Modelfile, TEMPLATE, name, and what `ollama create` says, with a stand-in for Ollama."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.cli.main import main
from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_text
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export import ollama
from qlora_tui.export.gguf import GgufExport
from qlora_tui.export.ollama import check_name, context_size, export_ollama
from qlora_tui.export.ollama_template import go_literal, ollama_template, render_go_template
from qlora_tui.runs.directory import create_run
from tests.data.families import FAMILIES, tokenizer_for
from tests.export.export_sources import make_source
from tests.export.gguf_files import hide_llama_cpp

pytestmark = pytest.mark.slow

CREATES = """\
#!/bin/sh
[ "$1 $2 $3 $4" = "create tickets:8b -f Modelfile" ] || exit 9
grep -q "^FROM ./tickets-8b.gguf" Modelfile && [ -s tickets-8b.gguf ] || exit 8
printf '\\033[?25lgathering model components \\342\\240\\213\\033[K\\r' >&2
printf 'gathering model components \\342\\240\\231\\033[K\\r' >&2
printf 'copying file sha256:12 35%% \\342\\226\\225\\342\\226\\210 \\342\\226\\217\\r' >&2
printf 'copying file sha256:12 99%% \\342\\226\\225\\342\\226\\210\\342\\226\\217\\nsuccess\\n' >&2
"""
FAILS = "#!/bin/sh\necho 'Error: could not connect to ollama app, is it running?' >&2\nexit 1\n"


HAS_TICKETS = """\
#!/bin/sh
case "$1" in
show) [ "$2" = tickets ] ;;
create) echo success ;;
esac
"""


@pytest.fixture
def install_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``install_ollama(script)``: the program `ollama`, or none for an empty script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("sh", "grep"):
        (folder / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setenv("PATH", str(folder))

    def install(script: str) -> None:
        if script:
            (folder / "ollama").write_text(script)
            (folder / "ollama").chmod(0o755)

    return install


@pytest.fixture
def without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files are written without the comparison, which other tests make."""
    hide_llama_cpp(monkeypatch)


@pytest.mark.usefixtures("without_proof")
def test_the_context_is_at_most_that_of_the_file(
    tmp_path: Path, install_ollama: Callable[[str], None]
) -> None:
    install_ollama("")
    source = make_source(tmp_path, model_type="phi3", sliding_window=200)
    export_ollama(source, "adapter", "tickets", tmp_path / "out", "F16")
    assert "PARAMETER num_ctx 200\n" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.usefixtures("without_proof")
def test_a_modelfile_is_written_and_its_command_is_printed(
    tiny_source: ChatSource,
    tmp_path: Path,
    install_ollama: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_ollama("")
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    folder = tmp_path / "out"
    assert main(["export", "ollama", run.id, "tickets:8b", "--quant", "F16", "--dir", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "tickets-8b.gguf"]
    lines = (folder / "Modelfile").read_text()
    assert lines.startswith('FROM ./tickets-8b.gguf\nTEMPLATE """')
    assert "\nPARAMETER num_ctx " in lines
    assert '\nPARAMETER stop "' in lines
    assert "ADAPTER" not in lines
    assert f"Create it: cd {folder} && ollama create tickets:8b -f Modelfile" in capsys.readouterr().out
    assert main(["export", "ollama", run.id, "tickets:8b", "--dir", str(folder)]) == 2


@pytest.mark.usefixtures("without_proof")
def test_the_installed_ollama_creates_the_model(
    tiny_source: ChatSource, tmp_path: Path, install_ollama: Callable[[str], None]
) -> None:
    install_ollama(CREATES)
    statuses: list[str] = []
    result = export_ollama(
        tiny_source, "adapter", "tickets:8b", tmp_path / "out", "F16", on_status=statuses.append
    )
    assert result.created
    assert [line for line in statuses if line.startswith("ollama: ")] == [
        "ollama: gathering model components",
        "ollama: copying file sha256:12",
        "ollama: success",
    ]


@pytest.mark.usefixtures("without_proof")
def test_a_model_in_ollama_is_replaced_only_on_request(
    tiny_source: ChatSource, tmp_path: Path, install_ollama: Callable[[str], None]
) -> None:
    install_ollama(HAS_TICKETS)
    with pytest.raises(UserError, match="The model name is already in use") as refused:
        export_ollama(tiny_source, "adapter", "tickets", tmp_path / "out", "F16")
    assert "--replace" in refused.value.fix
    assert not (tmp_path / "out").exists()
    assert export_ollama(
        tiny_source, "adapter", "tickets", tmp_path / "out", "F16", replace_model=True
    ).created


def test_an_ollama_that_hangs_may_have_such_a_model(
    tiny_source: ChatSource,
    tmp_path: Path,
    install_ollama: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ollama, "_SHOW_S", 0.1)
    install_ollama("#!/bin/sh\nwhile :; do :; done\n")
    with pytest.raises(UserError, match="Ollama does not answer"):
        export_ollama(tiny_source, "adapter", "tickets", tmp_path / "out", "F16")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_proof")
def test_a_model_that_appears_meanwhile_is_not_replaced(
    tiny_source: ChatSource, tmp_path: Path, install_ollama: Callable[[str], None]
) -> None:
    install_ollama("#!/bin/sh\nexit 1\n")

    def on_status(words: str) -> None:
        if words.startswith("Writing"):
            install_ollama(HAS_TICKETS)

    with pytest.raises(UserError, match="The model name is already in use") as refused:
        export_ollama(tiny_source, "adapter", "tickets", tmp_path / "out", "F16", on_status=on_status)
    assert "is complete, but was not passed to Ollama" in refused.value.why
    assert (tmp_path / "out" / "tickets.gguf").is_file()


@pytest.mark.usefixtures("without_proof")
def test_a_failed_creation_keeps_the_files(
    tiny_source: ChatSource, tmp_path: Path, install_ollama: Callable[[str], None]
) -> None:
    install_ollama(FAILS)
    with pytest.raises(UserError) as refused:
        export_ollama(tiny_source, "adapter", "tickets:8b", tmp_path / "out", "F16")
    assert "could not connect to ollama app" in refused.value.what
    assert "ollama create tickets:8b -f Modelfile" in refused.value.fix
    assert (tmp_path / "out" / "tickets-8b.gguf").is_file()


def test_a_failed_export_leaves_no_folder(
    tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> GgufExport:
        raise UserError("The GGUF file does not answer like the adapter", what="Q2_K: KL.")

    monkeypatch.setattr(ollama, "export_gguf", fail)
    with pytest.raises(UserError):
        export_ollama(tiny_source, "adapter", "tickets", tmp_path / "out", "Q2_K")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("max_length", "limit", "size"),
    [(512, 8192, 4096), (5000, 8192, 8192), (5000, 6000, 6000), (512, 2048, 2048), (4096, None, 4096)],
)
def test_the_context_holds_a_row_and_fits_the_model(max_length: int, limit: int | None, size: int) -> None:
    assert context_size(max_length, limit) == size


@pytest.mark.parametrize(
    "name", ["tickets", "tickets:8b", "me/tickets:8b-q4", "host.org:5000/me/t", "_a.b-c"]
)
def test_a_name_of_ollama_is_accepted(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "-f", "a b", "a:", ":a", "a/b/c/d", "../x", "a/../b", "ä", "a\n", "a" * 81, "a;b", "me/.x", "a:b:c"],
)
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="Invalid name for Ollama"):
        check_name(name)


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
