"""A Llama with random weights and a tokenizer for it, written as a model folder: no Hub, no download.

``doctor`` trains one of two layers; ``bench`` and the tests train larger and smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_tui.data.chat_template import stock_template

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_random_model(folder: Path, texts: Sequence[str], *, device: str = "cpu", **shape: Any) -> Path:
    """Write weights, in bfloat16 and in files of 1 GB, and a tokenizer trained on ``texts``.

    Args:
        device: where the numbers are drawn: eight billion take a CPU minutes.
        shape: settings of ``LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    template = stock_template("chatml", SPECIAL_TOKENS, begins_with_bos=False)
    tokenizer = write_tokenizer(folder, texts, template, vocab_size=512)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, **shape},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="1GB")
    return folder


def write_tokenizer(folder: Path, texts: Sequence[str], template: str, *, vocab_size: int) -> Any:
    """Write a byte-level BPE tokenizer of at most ``vocab_size`` tokens, from ``texts``; return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast
