"""``qlora-tui export merge``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.cli.export import _types
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.export import forms
from qlora_tui.export.gguf import check_file_types
from qlora_tui.export.unfinished_files import require_space
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.exports import ExportRequest

pytestmark = pytest.mark.slow


def test_merging_a_run_twice_is_a_usage_error(
    tiny_source: ChatSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    out = tmp_path / "merged"
    assert main(["export", "merge", run.id, str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    check = said.pop("check")
    assert said.pop("base")["chosen"] == "dequantized"
    assert check["agrees"] and check["same_choices"] == check["tokens"] > 8
    assert said == {
        "folder": str(out),
        "bytes": sum(f.stat().st_size for f in out.iterdir()),
        "changed_weights": 14,
        "unchecked_because": "",
    }
    assert main(["export", "merge", run.id, str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_merge_that_answers_otherwise_is_an_error(
    tiny_source: ChatSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_tui.adapters.deltas import LoraDelta

    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    monkeypatch.setattr(LoraDelta, "change", lambda self: -(self.up.float() @ self.down.float()))
    assert main(["export", "merge", run.id, str(tmp_path / "merged")]) == 1
    assert "The merged model does not answer like the adapter" in capsys.readouterr().err


def test_a_run_without_an_adapter_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_tui.recipe.schema import Model, Recipe

    run = create_run(Recipe(name="early", model=Model(id="org/model")))
    assert main(["export", "merge", run.id, str(tmp_path / "merged")]) == 1
    assert "No adapter yet" in capsys.readouterr().err


@pytest.mark.parametrize("bound", ["-1", "0", "nan", "inf", "near"])
def test_a_bound_that_is_no_bound_is_a_usage_error(bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "gguf", "last", "out.gguf", "--within", bound])
    assert ended.value.code == 2
    assert "is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("types", "error"), [("auto,Q8_0", "auto alone"), ("q4_k_m, q9", "q9 is not a type"), ("Auto,auto", "")]
)
def test_types_are_read_in_any_case(types: str, error: str) -> None:
    kinds = _types(types).split(",")
    if not error:
        assert kinds == ["auto", "auto"]
        return
    with pytest.raises(UserError) as refused:
        check_file_types([kind for kind in kinds if kind != "Q4_K_M"], is_auto=False)
    assert error in str(refused.value) and len(kinds) == 2


def test_a_file_system_without_a_size_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    require_space(tmp_path / "out", 10, "The file")


def test_a_refused_type_ends_the_command_with_an_error(
    tiny_source: ChatSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    result = ExportRequest(form="gguf", out="m.gguf")
    written = forms.Written(
        result=result, sizes={"m.gguf": 7}, summary="", command="", problem="Q2_K: too far."
    )
    monkeypatch.setattr(forms, "export_form", lambda *arguments: written)
    assert main(["export", "gguf", run.id, str(tmp_path), "--quant", "Q8_0,Q2_K"]) == 1
    output = capsys.readouterr()
    assert "m.gguf: 7 bytes" in output.out and "Refused: Q2_K: too far." in output.err
