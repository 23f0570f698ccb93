"""gpt-oss as it is stored on the Hub: experts in MXFP4, quantized to NF4 as they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_tui.catalog.model_validation import check_folder
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from qlora_tui.export.merge import merge
from qlora_tui.export.merged_weights import merged_weights, require_mergeable
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.training.experts.experts_4bit import PROJECTIONS, experts_4bit
from qlora_tui.training.experts.mxfp4 import dequantize_mxfp4
from tests.training.mxfp4_files import save_both
from tests.training.test_experts import AllocatedStorages, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_both(tmp_path_factory.mktemp("gpt_oss"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_is_decoded_as_transformers_decodes_it(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 4, 16)
    scales = torch.arange(108, 124, dtype=torch.uint8).reshape(1, 4, 4)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T
    assert torch.equal(dequantize_mxfp4(blocks[0], scales[0], dtype), expected)
    # Values of bfloat16 up to 256 are exact: transformers may have cast the bytes.
    cast = (blocks[0].bfloat16(), scales[0].bfloat16())
    assert torch.equal(dequantize_mxfp4(*cast, dtype), expected)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_experts_are_quantized_as_those_of_16_bit_files(folders: tuple[Path, Path], method: str) -> None:
    packed, plain = (load(folder, method=method, compute_dtype="bfloat16") for folder in folders)
    expected = dict(experts_4bit(plain))
    for name, experts in experts_4bit(packed):
        for projection in PROJECTIONS:
            tensors, others = experts.tensors(projection), expected[name].tensors(projection)
            assert all(torch.equal(tensors[suffix], others[suffix]) for suffix in others)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, plain(ids).logits)


class AllocatedBesideFile(AllocatedStorages):  # type: ignore[no-untyped-call]  # torch's own
    """Counts what is allocated, and not blocks and scales of the mapped weight file."""

    mapped_bytes = (64 * 128 * 32, 64 * 64 * 32, 64 * 128 * 2, 64 * 64 * 2)


def test_loading_holds_one_expert_in_16_bits(tmp_path: Path) -> None:
    folder, _ = save_both(tmp_path, num_local_experts=64, num_hidden_layers=1)
    with AllocatedBesideFile() as storages:
        model = load(folder, compute_dtype="bfloat16")
    (packed,) = dict(experts_4bit(model)).values()
    matrix_bytes = 2 * packed.layout("gate_up_proj").numel
    # Decoding has indices of four bytes a weight beside it.
    assert storages.peak_bytes - storages.live_bytes < 6 * matrix_bytes


def test_the_model_can_be_trained_but_not_in_16_bits(folders: tuple[Path, Path]) -> None:
    packed, _ = folders
    architecture, refusal = check_folder(packed, "gpt-oss")
    assert refusal is None and architecture is not None and architecture.quantized_as == "mxfp4"
    for settings, setting in (({"method": "none"}, "method"), ({"experts": False}, "experts")):
        with pytest.raises(UserError, match=f"quantization.{setting} is"):
            load(packed, **settings)


def test_a_merge_is_refused_with_another_way_out(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    require_mergeable(plain)
    source = ChatSource(recipe=Recipe(model=Model(id=str(packed))), adapters={"adapter": ""})
    exports: list[Callable[[], object]] = [
        partial(merged_weights, source, "adapter", print),
        partial(merge, source, "adapter", tmp_path / "merged"),
    ]
    for export in exports:
        with pytest.raises(UserError, match="export adapter RUN FOLDER"):
            export()
