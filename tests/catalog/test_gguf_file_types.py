"""The table of file types agrees with the package that defines them."""

from __future__ import annotations

import pytest

from qlora_tui.catalog.gguf_file_types import (
    FILE_TYPES,
    LADDER,
    OFFERED,
    FileType,
    find_file_type,
    needs_llama_cpp,
    next_larger,
    size_from_parameters,
)
from qlora_tui.errors import UserError


@pytest.mark.parametrize("file_type", FILE_TYPES.values(), ids=lambda each: each.name)
def test_a_file_type_is_as_ggml_defines_it(file_type: FileType) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    assert LlamaFileType[f"MOSTLY_{file_type.name}"] == file_type.number
    main = file_type.name.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[main]]
    assert file_type.block == block
    if not file_type.needs_llama_cpp:
        assert file_type.bits_per_weight == 8 * size / block


def test_types_are_sorted_and_those_of_auto_and_of_the_dialog_are_among_them() -> None:
    sizes = [each.bits_per_weight for each in FILE_TYPES.values()]
    limits = [each.kl_limit for each in FILE_TYPES.values()]
    assert sizes == sorted(sizes, reverse=True) and limits == sorted(limits)
    assert [next_larger(name) for name in LADDER] == [*LADDER[1:], "F16"]
    assert {name for name in OFFERED if not needs_llama_cpp(name)} == {"Q8_0", "F16"}


def test_an_unknown_type_is_refused_by_name() -> None:
    for read in (find_file_type, needs_llama_cpp, next_larger, lambda name: size_from_parameters(1, name)):
        with pytest.raises(UserError, match="Q9_9 is not a type"):
            read("Q9_9")
