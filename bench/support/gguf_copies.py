"""Copies of GGUF files with float32 weights and other metadata, written with the ``gguf`` package alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

_NONE: Mapping[str, Any] = MappingProxyType({})


def float32_copy(
    file: Path,
    target: Path,
    metadata: Mapping[str, Any] = _NONE,
    vectors: Mapping[str, Sequence[float]] = _NONE,
) -> Path:
    """Write ``file`` to ``target`` with float32 weights, because with others llama.cpp also rounds
    activations.

    Weights that are not float32 are first rounded to bfloat16, as in a conversion.

    Args:
        file: The GGUF file.
        target: Output file.
        metadata: Values by key, which replace those of the file or are added.
        vectors: Additional float32 tensors by name.
    """
    reader = GGUFReader(file)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, metadata.get(key, field.contents()), field.types[0], inner)
    for key in metadata.keys() - reader.fields.keys():
        value = metadata[key]
        kinds = {float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
        kind = kinds.get(type(value)) or GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind, GGUFValueType.STRING if isinstance(value, list) else None)
    for name, values in vectors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.tensor_type != GGMLQuantizationType.F32:
            weights = torch.from_numpy(weights).bfloat16().float().numpy()
        writer.add_tensor(tensor.name, weights, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
