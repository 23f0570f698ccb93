"""The keys of a task file that are read, and what a refusal of the others says.

Only keys whose values are data are passed on: whatever is not listed here is refused by name, so that a key
that a later lm-eval learns cannot run code either.
"""

from __future__ import annotations

from typing import Final

TEMPLATES: Final = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix")
"""Keys whose text is a template."""
PLAIN: Final = (
    "task",
    "task_alias",
    "include",
    "dataset_path",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "num_fewshot",
    "target_delimiter",
    "fewshot_delimiter",
    "output_type",
    "generation_kwargs",
    "metric_list",
    "filter_list",
)
IGNORED: Final = ("tag", "group_alias", "metadata", "dataset_name", "repeats", "should_decontaminate")
"""Keys without an effect on a local task whose value is empty or says nothing; others are refused."""
HARMLESS: Final[dict[str, tuple[object, ...]]] = {
    "dataset_name": (None, "", "default"),
    "repeats": (None, 1),
    "should_decontaminate": (None, False),
}
FEWSHOT: Final = ("sampler", "split", "samples", "fewshot_delimiter", "target_delimiter", *TEMPLATES)
SAMPLERS: Final = ("default", "first_n")
_CODE: Final = "It names Python code, which a task file must not choose."
REFUSED: Final[dict[str, tuple[str, str]]] = {
    "class": (_CODE, "Write the task as YAML without a class."),
    "custom_dataset": (_CODE, "Name the rows in dataset_kwargs: {data_files: FILE}."),
    "process_docs": (_CODE, "Write the rows as they should be read into the data file."),
    "process_results": (_CODE, "Use the metrics acc, acc_norm or exact_match."),
    "unsafe_code": ("It asks for the execution of answers.", "Remove the key if the task needs none."),
    "doc_to_image": ("Images are not read.", "Leave the task out."),
    "doc_to_audio": ("Audio is not read.", "Leave the task out."),
    "use_prompt": ("It downloads prompts.", "Write the prompt into doc_to_text."),
    "group": ("It is a group of tasks.", "Name the folder with the files of its tasks."),
    "doc_to_decontamination_query": ("Decontamination is not done.", "Remove the key."),
}
"""Why a key is refused, and what to do."""
LOADERS: Final = ("json", "parquet")
"""Values of ``dataset_path`` that mean a file."""
METRICS: Final[dict[str, tuple[str, ...]]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
"""Metrics with a value for each row, by the type of output. Others are downloaded, or of all rows at once."""
DEFAULT_METRICS: Final = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
METRIC_KEYS: Final = (
    "metric",
    "aggregation",
    "higher_is_better",
    "ignore_case",
    "ignore_punctuation",
    "ignore_numbers",
    "regexes_to_ignore",
)
FILTERS: Final = (
    "take_first",
    "regex",
    "remove_whitespace",
    "lowercase",
    "uppercase",
    "map",
    "multi_choice_regex",
)
MAX_NEW_TOKENS_KEYS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GENERATION: Final = ("until", "do_sample", "temperature", *MAX_NEW_TOKENS_KEYS)
