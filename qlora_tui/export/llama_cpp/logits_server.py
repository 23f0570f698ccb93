"""The process that computes logits of one GGUF file for the chat.

Arguments: the file and the context length. First it writes the size of the vocabulary, int32. A request on
stdin is two int32, the number of tokens it has and the number of new ones, and the new tokens. The reply on
stdout is the logits after the last new token, float32. A request without new tokens truncates; its reply is
the number of tokens that were kept, int32. Little-endian.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError


def main() -> None:
    """Serve until stdin ends."""
    path, context = sys.argv[1], int(sys.argv[2])
    # llama.cpp prints to stdout too: give it stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        with LlamaCpp().open(path, context=context) as model:
            replies.write(np.int32(model.vocabulary_size).tobytes())
            replies.flush()
            while len(head := sys.stdin.buffer.read(8)) == 8:
                keep, count = np.frombuffer(head, "<i4")
                ids = np.frombuffer(sys.stdin.buffer.read(4 * int(count)), "<i4").tolist()
                if ids:
                    replies.write(model.extend(ids, start=int(keep)).tobytes())
                else:
                    replies.write(np.int32(keep if model.truncate(int(keep)) else 0).tobytes())
                replies.flush()
    except LlamaCppError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
