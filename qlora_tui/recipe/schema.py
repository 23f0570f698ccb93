"""Every setting of a run, declared once.

From these declarations come the TOML keys, ``--set section.key=value``, the forms of the app, validation and
``qlora-tui presets reference``. A setting's ``Meta`` holds its label (``title``), its one-line help
(``description``), its bounds, and its effect on memory (``extra["memory"]``).
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from qlora_tui.recipe.preference_methods import (
    PAIR_METHODS,
    PREFERENCE_TRAITS,
    PreferenceMethod,
    PreferenceTraits,
)
from qlora_tui.recipe.training_settings import Training, about

ALL_LINEAR = "all-linear"
"""Target pattern of every linear module of the language model except the output head. See :mod:`.targets`."""

Thinking = Literal["auto", "on", "off"]
"""Thinking mode.

For a training row, ``auto`` means ``on`` if an answer has reasoning, and otherwise ``off`` if the template
can turn thinking off. For a prompt that the model answers, ``auto`` means the template's default.
"""
Preferences = Literal["refuse", "chosen", PreferenceMethod]
"""How a run uses preference data: it refuses to train, trains on the chosen answers only, or trains with a
preference method.
"""


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base model and its attention."""

    id: Annotated[str, about("Model", "A Hub id, a folder, or a GGUF file.")] = ""
    revision: Annotated[str, about("Revision", "Branch, tag or commit of a Hub model.")] = "main"
    attention: Annotated[
        Literal["auto", "sdpa", "flash", "eager"],
        about(
            "Attention",
            "Attention kernel. auto: flash (one call for all samples of a packed sequence) if the GPU "
            "supports it, otherwise sdpa (sample by sample).",
            "With eager, each layer keeps the full matrix of scores (tokens squared).",
        ),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "torch"],
        about(
            "Kernels",
            "auto: Triton kernels for norms, rotary positions and gated MLPs, on a GPU if they compile and "
            "match torch. torch: no Triton kernels.",
            "With Triton, these operations need no temporary copies.",
        ),
    ] = "auto"
    chat_template: Annotated[
        Literal["auto", "chatml", "llama-3", "alpaca", "plain"],
        about("Chat template", "auto uses the tokenizer's template; a base model without one gets chatml."),
    ] = "auto"


class Quantization(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the frozen base weights are stored."""

    method: Annotated[
        Literal["nf4", "fp4", "int8", "none"],
        about(
            "Method",
            "How the frozen weights are stored. nf4: 4 bits, as in the QLoRA paper. none: 16 bits.",
            "Per linear weight: half a byte with nf4 and fp4, one with int8, two with none.",
        ),
    ] = "nf4"
    double_quantization: Annotated[
        bool,
        about(
            "Double quantization",
            "Quantize the scales of the 4-bit blocks too.",
            "Saves 0.37 bits per weight.",
        ),
    ] = True
    experts: Annotated[
        bool,
        about(
            "Quantize experts",
            "With nf4 and fp4, quantize the experts of a mixture of experts too. false keeps them in 16 "
            "bits.",
            "Experts are most of such a model's weights: half a byte per weight, or two bytes in 16 bits.",
        ),
    ] = True
    skip: Annotated[
        tuple[str, ...],
        about(
            "Skip",
            "Linear modules that stay in 16 bits, by target pattern: a module (o_proj), or all modules of "
            "some layers (0,29.all-linear). `estimate --quality` finds layers for which 16 bits matter.",
            "Two bytes per weight of these modules.",
        ),
    ] = ()
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        about(
            "Compute dtype",
            "auto: bfloat16 from compute capability 8.0, float16 below it, the fastest dtype on a CPU.",
            "Activations, embeddings and the head have this dtype.",
        ),
    ] = "auto"
    streamed_layers: Annotated[
        int,
        about(
            "Streamed layers",
            "Layers whose frozen weights stay in host memory and are copied to the GPU for each pass: for a "
            "model that does not fit, at the cost of speed. 0: none.",
            "Two layers are on the GPU at a time; all streamed layers take host memory.",
            ge=0,
            le=1024,
        ),
    ] = 0


class Lora(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter, which is trained."""

    rank: Annotated[
        int,
        about(
            "Rank",
            "Rank of the two matrices added to each target module.",
            "16 bytes per adapter parameter with 32-bit AdamW.",
            ge=1,
            le=1024,
        ),
    ] = 16
    alpha: Annotated[
        float,
        about("Alpha", "The update is scaled by alpha / rank (by alpha / √rank with rsLoRA).", gt=0, le=8192),
    ] = 32.0
    dropout: Annotated[
        float,
        about(
            "Dropout",
            "Dropout on the adapter's input. 0 is faster; 0.05 to 0.1 helps with little data.",
            "Above 0, each target keeps one byte per element of its input.",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        about(
            "Target modules",
            "all-linear, module names (q_proj), or names in a range of layers (8-23.q_proj, 0-3.all-linear).",
            "More targets take more memory for adapter, gradients and optimizer.",
            min_length=1,
        ),
    ] = (ALL_LINEAR,)
    rank_pattern: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=1024)]],
        about(
            "Rank by pattern",
            "Rank overrides by target pattern (8-23.q_proj = 32). If two patterns match a module, the later "
            "pattern wins.",
        ),
    ] = {}
    alpha_pattern: Annotated[
        dict[str, Annotated[float, Meta(gt=0, le=8192)]],
        about("Alpha by pattern", "Alpha overrides by target pattern (8-23.q_proj = 64)."),
    ] = {}
    use_rslora: Annotated[bool, about("rsLoRA", "Scale by alpha / √rank, which keeps high ranks stable.")] = (
        False
    )
    use_dora: Annotated[
        bool,
        about(
            "DoRA",
            "Train magnitude and direction separately: often better at low rank, always slower.",
            "Rebuilds each target's weight in 16 bits during the forward pass.",
        ),
    ] = False
    init_from: Annotated[
        str,
        about(
            "Start from",
            "An adapter to train further: a run, or the folder of an adapter, which is not changed. Rank, "
            "alpha and targets must be those of the adapter. Empty: a new adapter.",
        ),
    ] = ""
    trainable_tokens: Annotated[
        tuple[str, ...],
        about(
            "Trainable tokens",
            "Tokens whose rows in embedding and head are trained too, such as tokens that the base model "
            "never learned.",
            "One row of hidden size per token, two if the head is not tied to the embedding.",
            max_length=256,
        ),
    ] = ()
    train_embeddings: Annotated[
        bool,
        about(
            "Train embeddings",
            "Train the whole input embedding and output head too, at their own learning rate (Embedding "
            "LR): for a new language or domain from plain text (continued pretraining).",
            "4 bytes per weight of both, the same for gradients, plus the optimizer's states.",
        ),
    ] = False


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data file, folder or Hub dataset."""

    path: Annotated[str, about("Path", "A file, a folder of files, or a Hub dataset id.", min_length=1)]
    format: Annotated[
        Literal[
            "auto",
            "messages",
            "sharegpt",
            "alpaca",
            "prompt-completion",
            "question-answer",
            "decision",
            "preference",
            "text",
        ],
        about("Format", "auto decides from the first rows."),
    ] = "auto"
    columns: Annotated[
        dict[str, str],
        about(
            "Columns", "Which column holds which part of a sample, for column names that are not recognized."
        ),
    ] = {}
    weight: Annotated[
        float,
        about("Weight", "How often rows of this source are seen, relative to other sources.", gt=0, le=1000),
    ] = 1.0
    excluded_rows: Annotated[
        str,
        about(
            "Excluded rows",
            'Rows that are left out, by number: "3, 17, 40-45". For a folder, such numbers apply to every '
            'file; "a.jsonl: 3, 17; more/b.jsonl: 40-45" names rows of two of its files. In JSONL and text '
            "files, the number of a row is that of its first line.",
        ),
    ] = ""


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training data."""

    sources: Annotated[
        tuple[Source, ...], about("Sources", "Training files, each with its format and weight.")
    ] = ()
    validation_path: Annotated[
        str, about("Validation file", "A file to validate on. Empty: a fraction of the sources.")
    ] = ""
    validation_fraction: Annotated[
        float, about("Validation fraction", "Share of the rows set aside for validation.", ge=0, lt=1)
    ] = 0.05
    validation_seed: Annotated[
        int,
        about(
            "Validation seed",
            "Seed for choosing the validation rows, if they are a fraction of the sources: set it to compare "
            "runs with different seeds on the same rows. 0: the run's seed.",
            ge=0,
            lt=2**32,
        ),
    ] = 0
    max_length: Annotated[
        int,
        about(
            "Sequence length",
            "Tokens in one sequence. Overflow decides what happens to longer samples.",
            "Activations and loss grow in proportion to the length.",
            ge=16,
            le=1_048_576,
        ),
    ] = 1024
    overflow: Annotated[
        Literal["drop", "cut-left", "cut-right", "split"],
        about(
            "Overflow",
            "Samples that are longer than Sequence length: drop them, cut one end, or split after the last "
            "answer that fits.",
        ),
    ] = "cut-right"
    packing: Annotated[
        bool,
        about(
            "Packing",
            "Put several whole samples in one sequence without attention between them: no padding.",
            "Sequences are nearly full, so every step is close to the peak.",
        ),
    ] = True
    preferences: Annotated[
        Preferences,
        about(
            "Preference data",
            "How to use rows with chosen and rejected answers, or with ratings. refuse: not at all. chosen: "
            "train only on the chosen and well-rated answers. orpo, dpo, simpo: learn from pairs. kto: "
            "learn from rated answers or pairs.",
            "A pair is two sequences. dpo and kto also compute the base without gradients, which takes time.",
        ),
    ] = "refuse"
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        about(
            "Bad rows",
            "Rows that cannot be read or have no text to train on, such as invalid JSON: refuse to train "
            "while there are any, or skip them. A file that cannot be read to its end is always refused.",
        ),
    ] = "refuse"
    train_on: Annotated[
        Literal["assistant", "everything"],
        about(
            "Train on",
            "Tokens that are in the loss. assistant: only the assistant's turns. everything: all tokens.",
        ),
    ] = "assistant"
    thinking: Annotated[
        Thinking,
        about(
            "Thinking",
            "Value of enable_thinking in the chat template. auto: on for rows with reasoning, off for "
            "others. off: the reasoning of the rows is dropped.",
        ),
    ] = "auto"
    reasoning_in_loss: Annotated[
        bool,
        about("Reasoning in the loss", "Include the reasoning in the loss; otherwise it is only context."),
    ] = True


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting that defines a run. A preset sets some of them."""

    name: Annotated[str, about("Name", "Name of the run in lists.", max_length=80)] = ""
    note: Annotated[str, about("Note", "What this recipe is for.")] = ""
    model: Model = Model()
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data = Data()
    training: Training = Training()

    @property
    def has_model_and_data(self) -> bool:
        """Whether a model and data have been chosen, so that there is something to train."""
        return bool(self.model.id and self.data.sources)

    @property
    def effective_batch(self) -> int:
        """Sequences per optimizer step. If the run trains on pairs, one sequence contains both answers of
        each of its pairs.
        """
        return self.training.micro_batch_size * self.training.gradient_accumulation

    @property
    def split_seed(self) -> int:
        """Seed that selects the validation rows."""
        return self.data.validation_seed or self.training.seed

    @property
    def preference_method(self) -> PreferenceMethod | None:
        """The preference method; None for any other run, such as supervised fine-tuning."""
        choice = self.data.preferences
        return None if choice == "refuse" or choice == "chosen" else choice

    @property
    def trains_pairs(self) -> bool:
        """Whether the run trains on pairs of a chosen and a rejected answer."""
        return self.data.preferences in PAIR_METHODS

    @property
    def preference_traits(self) -> PreferenceTraits | None:
        """The traits of the preference method; None for a run without one."""
        method = self.preference_method
        return None if method is None else PREFERENCE_TRAITS[method]

    @property
    def learns_answers(self) -> bool:
        """Whether the run makes the answers in its data more likely."""
        traits = self.preference_traits
        return traits is None or traits.learns_answers

    @property
    def keeps_starting_adapter(self) -> bool:
        """Whether the adapter that the run starts from is kept, because its preference method needs it as the
        reference.
        """
        traits = self.preference_traits
        return bool(self.lora.init_from) and traits is not None and traits.uses_reference

    @property
    def rows_per_pass(self) -> int:
        """Sequences of at most ``data.max_length`` tokens in one forward pass."""
        return self.training.micro_batch_size * (2 if self.trains_pairs else 1)
