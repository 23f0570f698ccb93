"""Models on this machine: what is listed, what is refused and why, and finding one by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog import local_models
from qlora_tui.catalog.local_models import (
    LocalModel,
    converted_dir,
    describe_model,
    find_files,
    hub_cache_dir,
    list_local_models,
    load_architecture,
    resolve_model,
)
from qlora_tui.catalog.model_validation import check_folder
from qlora_tui.errors import UserError
from tests.catalog.configs import config
from tests.catalog.models import TINY, TINY_PARAMS, make_cached, make_gguf, make_model, safetensors_bytes


def _only(folder: Path) -> LocalModel:
    (model,) = list_local_models([folder])
    return model


def _refusal(folder: Path) -> UserError:
    refusal = _only(folder).refusal
    assert refusal is not None
    assert refusal.fix
    return refusal


def test_nothing_is_no_error(tmp_path: Path) -> None:
    assert list_local_models([tmp_path, tmp_path / "missing"]) == []


@pytest.mark.slow
def test_the_cache_is_where_the_library_says(tmp_path: Path) -> None:
    for settings in (
        {"HF_HUB_CACHE": str(tmp_path / "a")},
        {"HUGGINGFACE_HUB_CACHE": str(tmp_path / "b")},
        {"HF_HOME": "$HERE/c"},
        {"HF_HOME": "~/d"},
        {"XDG_CACHE_HOME": str(tmp_path / "e")},
        {},
    ):
        variables = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
        environ = {key: value for key, value in os.environ.items() if key not in variables}
        environ |= {"HERE": str(tmp_path), "HOME": str(tmp_path), **settings}
        output = subprocess.run(
            [
                sys.executable,
                "-c",
                "from huggingface_hub import constants; print(constants.HF_HUB_CACHE);"
                "from qlora_tui.catalog.local_models import hub_cache_dir; print(hub_cache_dir())",
            ],
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        theirs, ours = output.stdout.split()
        assert ours == theirs


@pytest.mark.slow
def test_every_source_is_listed_with_its_facts(tmp_path: Path) -> None:
    make_cached(hub_cache_dir(), "org/cached", shards=3)
    make_model(converted_dir() / "converted")
    make_model(tmp_path / "models" / "mine")
    make_gguf(tmp_path / "models" / "publisher" / "packed.gguf")
    models = {model.name: model for model in list_local_models([tmp_path / "models"])}
    assert {name: model.source for name, model in models.items()} == {
        "org/cached": "hub cache",
        "converted": "converted",
        "mine": "folder",
        "packed": "gguf",
    }
    for model in models.values():
        assert model.refusal is None
        assert model.architecture is not None
        assert model.architecture.total_params == TINY_PARAMS
        assert model.size_bytes > 200
        assert resolve_model(model.id).architecture.total_params == TINY_PARAMS


def test_an_unreadable_folder_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("qlora_tui.catalog.local_models.os.scandir", refuse)
    (model,) = [model for model in list_local_models([tmp_path]) if model.path == tmp_path]
    assert model.refusal is not None and "Permission denied" in model.refusal.what


def test_a_folder_that_is_a_model_is_listed_itself(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mine", shards=2)
    assert _only(folder).path == folder
    assert _only(folder).id == str(folder)


def test_refused_models_come_last(tmp_path: Path) -> None:
    make_model(tmp_path / "b")
    make_model(tmp_path / "a", {**TINY, "model_type": "bert"})
    assert [model.name for model in list_local_models([tmp_path])] == ["b", "a"]


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    assert "no config.json" in _refusal(tmp_path).what


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refusal = _refusal(tmp_path)
    assert "pickled" in refusal.title
    assert "pytorch_model.bin" in refusal.what


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "pytorch_model.bin").touch()
    assert _only(tmp_path).refusal is None


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "No weights" in _refusal(tmp_path).title


def test_a_model_without_its_tokenizer_is_refused_and_estimated(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    assert _refusal(tmp_path).title == "No tokenizer"
    assert "Download" in _refusal(tmp_path).fix and find_files(str(folder)).architecture
    (folder / "tokenizer.model").touch()
    assert "AutoTokenizer" in _refusal(tmp_path).fix


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "m", config("internlm/internlm2_5-7b"))
    refusal = _refusal(tmp_path)
    assert "own code" in refusal.title
    assert "trust_remote_code" in refusal.what


def test_an_auto_map_beside_a_known_family_does_no_harm(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {**TINY, "auto_map": {"AutoModel": "x.Y"}})
    assert _only(tmp_path).refusal is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["MistralModel"]}, "MistralModel"),
        ({"quantization_config": {"quant_method": "awq"}}, "stored as awq"),
        ({"quantization_config": {"bits": 4}}, "stored as an unnamed method"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "stored as compressed-tensors"),
        ({"quantization_config": {"quant_method": None, "bits": 4}}, "stored as an unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "stored as fp8 in one"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_lists_and_estimates(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = make_model(tmp_path / "m", {**TINY, **changes})
    assert named in _refusal(tmp_path).what
    for refuses in (load_architecture, describe_model):
        with pytest.raises(UserError) as refused:
            refuses(str(folder))
        assert named in refused.value.what


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_matrices_of_8_bits_need_a_config_that_says_how(tmp_path: Path, dtype: str) -> None:
    folder = make_model(tmp_path / "m")
    entry = {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, 8]}
    header = json.dumps({"layer.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="already quantized") as refused:
        find_files(str(folder))
    assert dtype in refused.value.what
    stored = {**TINY, "quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(stored))
    assert find_files(str(folder)).folder == folder


def test_a_shape_that_is_no_list_is_no_matrix(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    entry = {"dtype": "I8", "shape": 4, "data_offsets": [0, 8]}
    header = json.dumps({"layer.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert find_files(str(folder)).folder == folder


def test_a_config_of_many_levels_is_listed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    levels = 400
    nested = '{"part": ' * levels + "{}" + "}" * levels
    (folder / "config.json").write_text(f'{json.dumps(TINY)[:-1]}, "vision_config": {nested}}}')
    assert find_files(str(folder)).folder == folder


def test_weights_stored_by_bitsandbytes_may_be_trained(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {**TINY, "quantization_config": {"quant_method": "bitsandbytes"}})
    assert _only(tmp_path).refusal is None


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    (tmp_path / "m" / "adapter_model.safetensors").write_bytes(safetensors_bytes())
    assert "adapter" in _refusal(tmp_path).title


def test_a_missing_shard_is_an_incomplete_download(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refusal = _refusal(tmp_path)
    assert "Incomplete download" in refusal.title
    assert "model-00002-of-00003.safetensors" in refusal.what


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    folder = make_model(tmp_path / "m", shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in _refusal(tmp_path).what


def test_a_cached_model_whose_blob_is_gone_is_incomplete() -> None:
    snapshot = make_cached(hub_cache_dir(), "org/half", shards=2)
    (snapshot / "model-00001-of-00002.safetensors").resolve().unlink()
    (model,) = list_local_models()
    assert model.refusal is not None
    assert "Incomplete download" in model.refusal.title


def test_a_cached_single_file_is_an_incomplete_download() -> None:
    snapshot = make_cached(hub_cache_dir(), "org/bare")
    (snapshot / "config.json").unlink()
    (model,) = list_local_models()
    assert model.refusal is not None
    assert "Incomplete download" in model.refusal.title
    assert model.size_bytes > 0


@pytest.mark.slow
def test_a_cache_without_its_main_uses_the_snapshot_there_is() -> None:
    snapshot = make_cached(hub_cache_dir(), "org/pinned")
    (snapshot.parent.parent / "refs" / "main").unlink()
    assert resolve_model("org/pinned").folder == snapshot


def test_datasets_in_the_cache_are_passed_over() -> None:
    (hub_cache_dir() / "datasets--org--rows" / "snapshots").mkdir(parents=True)
    assert list_local_models() == []


@pytest.mark.slow
def test_a_cached_gguf_is_listed_as_one(tmp_path: Path) -> None:
    snapshot = make_cached(hub_cache_dir(), "org/packed-GGUF")
    for file in list(snapshot.iterdir()):
        file.unlink()
    make_gguf(snapshot / "packed.Q4_1.gguf")
    (model,) = list_local_models()
    assert (model.source, model.refusal) == ("gguf", None)
    files = resolve_model(model.id)
    assert (files.folder, files.gguf_file) == (snapshot, "packed.Q4_1.gguf")


def test_an_unreadable_gguf_is_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    assert "bad.gguf" in _refusal(tmp_path).what
    with pytest.raises(UserError):
        resolve_model(str(tmp_path / "bad.gguf"))


@pytest.mark.slow
def test_resolve_accepts_ids_names_folders_and_files(tmp_path: Path) -> None:
    snapshot = make_cached(hub_cache_dir(), "org/cached")
    make_model(converted_dir() / "converted")
    folder = make_model(tmp_path / "mine")
    packed = make_gguf(tmp_path / "packed.gguf")
    assert resolve_model("org/cached").folder == snapshot
    assert resolve_model("converted").folder == converted_dir() / "converted"
    assert resolve_model(str(folder)).folder == folder
    assert (resolve_model(str(packed)).folder, resolve_model(str(packed)).gguf_file) == (
        tmp_path,
        "packed.gguf",
    )


@pytest.mark.slow
def test_a_relative_path_resolves_to_one_that_is_good_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "mine")
    packed = make_gguf(tmp_path / "packed.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./mine").id == resolve_model("mine").id == str(folder)
    assert resolve_model("packed.gguf").id == str(packed)


@pytest.mark.parametrize(
    "name", ["Smol", "SmolLM2-135", "HuggingFaceTB/SmolLM2-135M-Instrct", "smollm2-135m-instruct"]
)
def test_a_name_nearly_right_gets_the_right_one(name: str) -> None:
    make_cached(hub_cache_dir(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in caught.value.fix


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../..", "/no/such", "~/no/such", "a" * 5000, "nul\0", "a/b/c", "~nobody-here/x"]
)
def test_nonsense_is_simply_not_here(name: str) -> None:
    with pytest.raises(UserError, match=r"not on this machine|no config"):
        resolve_model(name)


def test_a_refused_model_does_not_resolve(tmp_path: Path) -> None:
    make_model(tmp_path / "m", {**TINY, "model_type": "bert"})
    with pytest.raises(UserError, match="bert"):
        resolve_model(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        safetensors_bytes()[:-1],
        safetensors_bytes() + b"x",
        b"\xff" * 100,
        b"\x08" + bytes(7) + b"not json",
    ],
)
def test_weights_cut_short_do_not_resolve(tmp_path: Path, content: bytes) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="Damaged weights"):
        resolve_model(str(folder))


@pytest.mark.slow
def test_a_real_safetensors_file_is_whole(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder = make_model(tmp_path / "m")
    save_file({"a": np.ones(3), "b": np.ones((2, 2))}, folder / "model.safetensors", {"format": "pt"})
    assert resolve_model(str(folder)).folder == folder


def test_listing_loads_no_library() -> None:
    script = (
        "import sys; from qlora_tui.catalog.local_models import list_local_models; list_local_models();"
        "heavy = ('torch', 'transformers', 'numpy', 'huggingface_hub', 'gguf', 'safetensors');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_model_type_that_is_no_string_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "odd", {**TINY, "model_type": ["llama"]})
    make_model(tmp_path / "whole")
    whole, odd = list_local_models([tmp_path])
    assert (whole.name, whole.refusal) == ("whole", None)
    assert odd.refusal is not None
    assert "model_type is ['llama'], expected a string" in odd.refusal.what


def test_a_defect_in_reading_one_model_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "odd")
    make_model(tmp_path / "whole")

    def fail_on_odd(folder: Path, name: str) -> Any:
        if name == "odd":
            raise TypeError("unhashable type: 'list'")
        return check_folder(folder, name)

    monkeypatch.setattr(local_models, "check_folder", fail_on_odd)
    whole, odd = list_local_models([tmp_path])
    assert (whole.name, whole.refusal) == ("whole", None)
    assert odd.refusal is not None
    assert "unhashable type" in odd.refusal.what
