"""The checks before a launch, for the command line and the Train screen."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from qlora_tui import paths
from qlora_tui.data.inspection import inspect
from qlora_tui.data.quick_check import QuickCheckResult
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.files import private_dir
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_settings
from qlora_tui.recipe.schema import Data, Lora, Model, Preferences, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs import data_checks
from qlora_tui.runs.data_checks import data_error
from qlora_tui.runs.doctor import Check, CheckKind, Machine
from qlora_tui.runs.preflight import preflight, with_count
from qlora_tui.tui.screens.train.launch_pane import verdict_lines
from tests.catalog.configs import CONFIGS
from tests.catalog.models import make_adapter_files
from tests.tui.sample_data import readable_model


def checks_by_kind(recipe: Recipe, **machine: object) -> dict[CheckKind, Check]:
    """The first check of each kind."""
    checks = preflight(recipe, Machine(budget_for(None), **machine))  # type: ignore[arg-type]
    return {check.kind: check for check in reversed(checks)}


def test_preflight_names_what_is_missing_and_the_fix(tmp_path: Path) -> None:
    recipe = Recipe(
        model=Model(id="acme/nothing"), data=Data(sources=(Source(path=str(tmp_path / "none.jsonl")),))
    )
    checks = checks_by_kind(recipe, no_gpu=GpuUnavailableError(GpuUnavailableReason.NO_DRIVER))
    model, data, gpu = checks[CheckKind.MODEL], checks[CheckKind.DATA], checks[CheckKind.GPU]
    assert model.outcome == "error" and "Download it" in model.fix and model.problem is not None
    assert data.outcome == "error" and "does not exist" in data.text and data.problem is not None
    assert gpu.outcome == "warning" and "No NVIDIA driver found." in gpu.text
    assert checks[CheckKind.DISK].outcome == "ok"
    assert "starts at once" in checks[CheckKind.QUEUE].text


def test_a_missing_tokenizer_is_an_error_of_the_model_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ChatTokenizer.from_folder(tmp_path)
    passed = tuple(Check(kind, "ok", "") for kind in (CheckKind.MODEL, CheckKind.DATA))
    checks = with_count(passed, caught.value)
    assert [(check.kind, check.outcome) for check in checks] == [
        (CheckKind.MODEL, "error"),
        (CheckKind.DATA, "ok"),
    ]
    verdict, remedy, *_ = verdict_lines(checks, Recipe(), None, "", "this CPU", None, 120, 6)
    assert verdict.plain == "✗ Cannot train: no tokenizer."
    assert remedy.plain == f"▸ [1] {caught.value.fix}"
    (data, _) = with_count(passed[1:] + passed[:1], UserError("Not UTF-8", what="a"))
    assert (data.kind, data.outcome) == (CheckKind.DATA, "error")


@pytest.mark.slow
def test_the_memory_of_an_unknown_gpu_is_unknown(tmp_path: Path) -> None:
    recipe = Recipe(model=Model(id=readable_model(tmp_path)))
    sliced = GpuUnavailableError(GpuUnavailableReason.MIG)
    assert "unknown" in checks_by_kind(recipe, no_gpu=sliced)[CheckKind.MEMORY].text
    assert "this machine's memory" in checks_by_kind(recipe)[CheckKind.MEMORY].text
    checks = preflight(recipe, Machine(budget_for(None, 8 << 30), no_gpu=sliced))
    assert any("a GPU with 8.0 GiB" in check.text for check in checks)


@pytest.mark.slow
def test_missing_kernels_are_a_warning_on_a_gpu(tmp_path: Path) -> None:
    recipe = Recipe(model=Model(id=readable_model(tmp_path, "Qwen__Qwen3.5-27B")))
    gpu = GpuDevice(0, "NVIDIA GeForce RTX 4090", None, 24 << 30, "8.9", None)
    check = checks_by_kind(recipe, gpu=gpu)[CheckKind.KERNELS]
    assert check.outcome == "warning" and "causal-conv1d" in check.text and "pip install" in check.fix
    assert CheckKind.KERNELS not in checks_by_kind(recipe)


def test_preflight_reads_the_data_and_lists_earlier_queued_runs(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    checks = checks_by_kind(recipe, active="first", waiting=("other",))
    text = f"tickets.jsonl, {rows.stat().st_size} bytes, prompt-completion."
    assert checks[CheckKind.DATA] == Check(CheckKind.DATA, "ok", text)
    assert checks[CheckKind.QUEUE].outcome == "note"
    assert "first and 1 more" in checks[CheckKind.QUEUE].text


def test_a_check_can_skip_bad_rows_and_says_so(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3 + "{bad\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    blocked = _data_check(recipe)
    assert blocked.outcome == "error" and blocked.suggested_fix is not None
    check = _data_check(replace_settings(recipe, blocked.suggested_fix.changes))
    assert check.outcome == "warning" and check.fix == "The row is left out."
    assert "Not valid JSON (1 row of tickets.jsonl)" in check.text


def test_repaired_files_and_validation_files_are_checked_again(tmp_path: Path) -> None:
    rows, held = tmp_path / "tickets.jsonl", tmp_path / "held.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    rows.write_text(good + "{bad\n")
    held.write_text(good)
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),), validation_path=str(held)))
    assert _data_check(recipe).outcome == "error"
    rows.write_text(good)
    assert _data_check(recipe).outcome == "ok"
    held.write_text(good * 2 + "{bad\n")
    check = _data_check(recipe)
    assert check.outcome == "error" and "held.jsonl, row 3" in check.text


def test_errors_of_an_earlier_inspection_are_reported_at_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = QuickCheckResult(False, ())
    monkeypatch.setattr(data_checks, "quick_check", lambda *_: unseen)
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2 + "{bad\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    assert _data_check(recipe).outcome == "note"
    inspect(recipe.data.sources[0])
    check = _data_check(recipe)
    assert check.outcome == "error" and "row 3" in check.text


def test_the_data_check_counts_rows_that_are_not_used(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    good, empty = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "", "completion": ""}\n'
    beyond = json.dumps({"prompt": "why? " * 2000, "completion": "so."}) + "\n"
    rows.write_text(good * 31 + empty + beyond)
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    check = _data_check(recipe)
    assert check.outcome == "note" and "About 31 of 33 rows are used." in check.text
    rows.write_text(good * 31)
    assert _data_check(recipe).outcome == "ok"
    fewer = Recipe(data=Data(sources=(Source(path=str(rows), excluded_rows="2-4"),)))
    assert _data_check(fewer).outcome == "ok" and "3 rows excluded." in _data_check(fewer).text
    none = Recipe(data=Data(sources=(Source(path=str(rows), excluded_rows="1-99"),)))
    assert _data_check(none).problem is not None and "All 31 rows" in _data_check(none).text


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ('{"messages": [{"role": "user", "content": "Why?"}]}', {}, "No answer to learn"),
        ('{"prompt": "Why?", "completion": ""}', {}, "The completion is empty"),
        ('{"prompt": "a", "completion": "b", "label": false}', {"preferences": "chosen"}, "rated bad"),
        ('{"messages": [{"role": "wizard", "content": "b"}]}', {"bad_rows": "skip"}, "Unknown role"),
    ],
)
def test_rows_that_would_all_be_left_out_block_a_launch(
    tmp_path: Path, row: str, settings: dict[str, Any], reason: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{row}\n" * 30)
    source, data = Source(path=str(rows)), Data(**settings)
    check = _data_check(Recipe(data=structs.replace(data, sources=(source,))))
    assert check.outcome == "error" and check.problem is not None
    assert check.problem.title == "No row can be trained on" and reason in check.text
    (none_used,) = [p for p in inspect(source, None, data).problems if p.severity == "error"]
    assert (none_used.kind, none_used.count) == ("none-used", 30)


@pytest.mark.slow
def test_memory_that_does_not_fit_comes_with_the_cheapest_fix(tmp_path: Path) -> None:
    recipe = Recipe(model=Model(id=readable_model(tmp_path)), training=Training(micro_batch_size=512))
    checks = preflight(recipe, Machine(budget_for(None, 2 << 30)))
    memory = next(check for check in checks if check.kind is CheckKind.MEMORY)
    assert memory.outcome == "error" and memory.suggested_fix is not None
    fixed = preflight(
        replace_settings(recipe, memory.suggested_fix.changes), Machine(budget_for(None, 2 << 30))
    )
    assert next(check for check in fixed if check.kind is CheckKind.MEMORY).outcome != "error"


def test_data_that_cannot_be_trained_on_is_known_before_a_launch(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    recipe = Recipe(data=Data(sources=(Source(path=str(rows)),)))
    missing = data_error(recipe)
    assert missing is not None and missing.title == "No such data"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2 + "{bad\n")
    refused = data_error(recipe)
    assert refused is not None and refused.title == "Not valid JSON"
    skipping = structs.replace(recipe, data=structs.replace(recipe.data, bad_rows="skip"))
    assert data_error(skipping) is None
    rows.write_text('{"messages": [{"role": "wizard", "content": "b"}]}\n' * 22)
    unused = data_error(skipping)
    assert unused is not None and unused.title == "No row can be trained on"


def test_what_settings_leave_out_or_cut_is_a_warning(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("fox " * 300 + "\n\nshort\n")
    recipe = Recipe(data=Data(sources=(Source(path=str(book)),), max_length=64))
    check = _data_check(recipe)
    assert check.outcome == "warning" and check.text.startswith(
        "Long text (1 row of book.txt): One text holds"
    )
    assert 'data.overflow = "split"' in check.fix
    split = Recipe(data=Data(sources=(Source(path=str(book)),), max_length=64, overflow="split"))
    assert _data_check(split).outcome == "ok"


def test_preferences_are_an_error_until_the_user_chooses(tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    check = _data_check(Recipe(data=Data(sources=(Source(path=str(rows)),))))
    assert check.outcome == "error" and "compares answers" in check.text
    assert 'data.preferences = "chosen"' in check.fix
    chosen = Recipe(data=Data(sources=(Source(path=str(rows)),), preferences="chosen"))
    assert _data_check(chosen).outcome == "ok"


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        ("orpo", {"chosen": "a", "rejected": "b"}),
        ("kto", {"completion": "a", "label": True}),
        ("refuse", {"completion": "a"}),
    ],
)
def test_a_wrong_choice_for_preferences_comes_with_the_right_one(
    tmp_path: Path, method: str, answers: dict[str, object]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?"} | answers) + "\n" for n in range(3)))
    choice: Preferences = "dpo" if method == "refuse" else "refuse"
    recipe = Recipe(data=Data(sources=(Source(path=str(file)),), preferences=choice))
    blocked = _data_check(recipe)
    assert blocked.outcome == "error" and blocked.suggested_fix is not None
    fixed = replace_settings(recipe, blocked.suggested_fix.changes)
    assert fixed.data.preferences == method and _data_check(fixed).outcome == "ok"


def _data_check(recipe: Recipe) -> Check:
    return checks_by_kind(recipe)[CheckKind.DATA]


def test_a_dataset_of_the_hub_is_no_missing_file(tmp_path: Path) -> None:
    recipe = Recipe(data=Data(sources=(Source(path="owner/set"),)))

    check = _data_check(recipe)
    assert (check.outcome, "downloads from the Hub" in check.text) == ("note", True)
    assert "checked when the run starts" in check.text

    fetched = tmp_path / "set-train.jsonl"
    fetched.write_text('{"prompt": "a", "completion": "b"}\n' * 64)
    note = private_dir(paths.cache_dir() / "datasets") / "owner--set.json"
    note.write_text(json.dumps({"files": [str(fetched)], "split": "train"}))
    assert _data_check(recipe).text.startswith("owner/set, 2 KiB, prompt-completion.")
    note.write_text(json.dumps({"files": [str(fetched)], "split": "test"}))
    assert "split test, because it has none for training" in _data_check(recipe).text


def _with_steps(tmp_path: Path, max_steps: int, epochs: float = 2.0) -> Check:
    """The check of the settings with 200 rows of some 500 tokens: about 12 steps an epoch."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "why? " * 200, "completion": "so. " * 240}) + "\n")
    rows.write_text(rows.read_text() * 200)
    recipe = Recipe(
        data=Data(sources=(Source(path=str(rows)),), validation_fraction=0),
        training=Training(max_steps=max_steps, epochs=epochs),
    )
    checks = preflight(recipe, Machine(budget_for(None)))
    [found] = [check for check in checks if check.kind is CheckKind.SETTINGS]
    return found


def test_a_step_limit_below_the_epochs_is_a_warning(tmp_path: Path) -> None:
    limited = _with_steps(tmp_path, 6)
    assert limited.text == "Max steps is 6, so the run ends after about 0.46 of 2 epochs."
    assert _with_steps(tmp_path, 0).text == "About 26 steps in 2 epochs."


def test_a_run_of_few_steps_is_offered_a_smaller_accumulation(tmp_path: Path) -> None:
    fix = _with_steps(tmp_path, 0, epochs=0.5).suggested_fix
    assert fix is not None
    assert fix.changes == {"training.gradient_accumulation": 1}
    assert re.fullmatch(r"set Gradient accumulation to 1: about \d\d steps instead of \d", fix.label)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "rank", "outcome", "words"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 4, "ok", "Starts from the adapter"),
        ("acme/other", 4, "warning", "was trained on acme/other"),
        ("HuggingFaceTB/SmolLM2-135M", 8, "error", "rank 4 and alpha 8 in the recipe, 8 and 8"),
    ],
)
def test_an_adapter_to_start_from_is_checked(
    tmp_path: Path, base: str, rank: int, outcome: str, words: str
) -> None:
    folder = make_adapter_files(tmp_path / "adapter", layers=30, rank=rank, base_model_name_or_path=base)
    lora = Lora(rank=4, alpha=8, target_modules=("q_proj", "v_proj"), init_from=str(folder))
    check = checks_by_kind(Recipe(model=Model(id=readable_model(tmp_path)), lora=lora))[CheckKind.LORA]
    assert (check.outcome, words in check.text) == (outcome, True)


@pytest.mark.slow
def test_settings_with_which_experts_cannot_be_trained_are_errors(tmp_path: Path) -> None:
    folder = Path(readable_model(tmp_path))
    shutil.copy(CONFIGS / "openai__gpt-oss-20b.json", folder / "config.json")
    model = Model(id=str(folder))
    assert CheckKind.SETTINGS not in checks_by_kind(Recipe(model=model))
    in_16_bits = checks_by_kind(Recipe(model=model, quantization=Quantization(method="none")))
    assert "MXFP4" in in_16_bits[CheckKind.SETTINGS].text
    lora = Lora(target_modules=("experts.down_proj",), use_dora=True)
    with_dora = checks_by_kind(Recipe(model=model, lora=lora))[CheckKind.LORA]
    assert with_dora.outcome == "error" and "lora.target_modules names experts" in with_dora.text


@pytest.mark.slow
def test_trainable_tokens_and_targets_are_checked_before_a_launch(tmp_path: Path) -> None:
    model = Model(id=readable_model(tmp_path))
    fine = checks_by_kind(Recipe(model=model))
    assert CheckKind.LORA not in fine
    unknown = checks_by_kind(Recipe(model=model, lora=Lora(trainable_tokens=("<|nowhere|>",))))
    assert unknown[CheckKind.LORA].problem is not None
    assert "<|nowhere|>" in unknown[CheckKind.LORA].text
    nothing = checks_by_kind(Recipe(model=model, lora=Lora(target_modules=("none_proj",))))
    assert nothing[CheckKind.LORA].problem is not None
