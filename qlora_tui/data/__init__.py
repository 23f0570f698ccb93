"""Conversations from files, and what the model will see of them.

From the outside in:

* ``read``: rows out of JSON, JSONL, CSV, TSV, Parquet and text files, plain or compressed.
* ``formats`` (with ``chat_formats`` and ``pair_formats``): which format rows are in, and conversations from
  them.
* ``conversation``: what a conversation is.
* ``tokenizer``, ``template``, ``traits``, ``stock_templates``: a model's tokenizer and chat template, without
  transformers.
* ``render``, ``spans``: token ids and the mask of what is trained.
* ``dataset``, ``store``, ``split``, ``lengths``: the tokenized set on disk that the trainer maps.
* ``inspect``, ``problems``: what is wrong with a file, before a run.

Nothing here imports torch or transformers: the Data screen and the trainer share this code, so what
the screen shows is what is trained.
"""
