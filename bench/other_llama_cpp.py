"""An exported file in another build of llama.cpp: ik_llama.cpp, a fork with its own kernels.

    python -m bench.other_llama_cpp FILE.gguf PYTHON

``PYTHON`` is an interpreter with ``ik-llama-cpp-python``. The fork answers a question greedily; then both
builds compute the logits at every position of question and answer. Prints the largest and the mean KL
divergence, and the number of positions at which both rank the same token first. ``qlora-tui export gguf``
prints how the file differs from the trained model.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

QUESTION = "What is the capital of France, and why is it famous?"
ANSWER_TOKENS = 40
CONTEXT = 256


def main() -> None:
    """Run both builds, and print how they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("python", help="interpreter that has ik-llama-cpp-python")
    options = parser.parse_args()
    import torch

    from qlora_tui.export.llama_cpp.bindings import LlamaCpp
    from qlora_tui.export.reference import kl_divergence

    with (
        LlamaCpp().open(str(options.file), context=CONTEXT) as llama,
        tempfile.TemporaryDirectory() as folder,
    ):
        prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        question = llama.tokenize(prompt)
        saved = Path(folder) / "answer.npz"
        ids = ",".join(map(str, question))
        subprocess.run([options.python, __file__, "--ask", options.file, ids, saved], check=True)
        theirs = np.load(saved)
        tokens, logits = theirs["tokens"].tolist(), torch.from_numpy(theirs["logits"])
        ours = torch.from_numpy(llama.compute(tokens, range(len(tokens)), 0))
    divergences = kl_divergence(ours.log_softmax(-1), logits.log_softmax(-1))
    same = int((ours.argmax(-1) == logits.argmax(-1)).sum())
    print(f"{theirs['answer']}")
    print(
        f"KL {float(divergences.mean()):.1e} on average, {float(divergences.max()):.1e} at most; "
        f"the same first token at {same} of {len(tokens)} positions, the last {len(tokens) - len(question)} "
        "of an answer"
    )


def ask(file: str, question: list[int], saved: str) -> None:
    """Answer greedily with the fork; save all tokens, and the logits at each of them."""
    import ik_llama_cpp._ctypes_api as api
    from ik_llama_cpp._internals import IkContext, IkModel

    model = IkModel(file)
    context: Any = IkContext(model, n_ctx=CONTEXT)
    vocabulary = api.llama_vocab_n_tokens(model.vocab)

    def logits_of(tokens: list[int], start: int) -> list[np.ndarray]:
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if context.decode(batch):
            raise SystemExit("ik_llama.cpp could not decode.")
        pointers = (api.llama_get_logits_ith(context.ctx, index) for index in range(len(tokens)))
        floats = ctypes.POINTER(ctypes.c_float)
        rows = [np.ctypeslib.as_array(ctypes.cast(p, floats), (vocabulary,)).copy() for p in pointers]
        api.llama_batch_free(batch)
        return rows

    tokens = list(question)
    logits = logits_of(tokens, 0)
    for _ in range(ANSWER_TOKENS):
        token = int(logits[-1].argmax())
        if api.llama_token_is_eog(model.model, token):
            break
        logits += logits_of([token], len(tokens))
        tokens.append(token)
    answer = model.detokenize(tokens[len(question) :])
    np.savez(saved, tokens=np.array(tokens), logits=np.stack(logits), answer=answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(sys.argv[2], [int(token) for token in sys.argv[3].split(",")], sys.argv[4])
    else:
        main()
