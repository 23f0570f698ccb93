"""Every setting of a run, declared once.

From these declarations come the TOML keys, ``--set section.key=value``, the forms of the app,
validation and ``qlora-tui presets reference``. A setting's ``Meta`` holds its label (``title``), its
one-line help (``description``), its bounds, and what it does to memory (``extra["memory"]``).
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

ALL_LINEAR = "all-linear"
"""Target pattern: every linear module of the language model but the output head. See :mod:`.targets`."""

Thinking = Literal["auto", "on", "off"]
"""The setting. ``auto`` is, for a row, on where it has reasoning; for a prompt, the template's default."""

_MANY_STEPS = 10_000_000
"""A bound no run meets, so that a slip of the finger is an error and not an endless run."""


def _about(label: str, help_: str, memory: str = "", **bounds: Any) -> Meta:
    return Meta(title=label, description=help_, extra={"memory": memory}, **bounds)


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, and how it attends."""

    id: Annotated[str, _about("Model", "A hub id, a folder, or a GGUF file.")] = ""
    revision: Annotated[str, _about("Revision", "Branch, tag or commit of a hub model.")] = "main"
    attention: Annotated[
        Literal["auto", "sdpa", "flash", "eager"],
        _about(
            "Attention",
            "Which attention kernel; auto takes flash where the kernels package has it, else SDPA.",
            "eager keeps the whole score matrix: tokens squared, a layer.",
        ),
    ] = "auto"
    chat_template: Annotated[
        Literal["auto", "chatml", "llama-3", "alpaca", "plain"],
        _about("Chat template", "auto uses the tokenizer's own; a base model without one gets chatml."),
    ] = "auto"


class Quantization(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the frozen base weights are held."""

    method: Annotated[
        Literal["nf4", "fp4", "int8", "none"],
        _about(
            "Method",
            "nf4 is QLoRA; none keeps 16 bits a weight.",
            "nf4 and fp4 hold half a byte a linear weight, int8 one, none two.",
        ),
    ] = "nf4"
    double_quantization: Annotated[
        bool,
        _about("Double quantization", "Quantize the scales too.", "Saves 0.37 bits a weight."),
    ] = True
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _about(
            "Compute dtype",
            "auto: bfloat16 from compute capability 8.0, float16 below, what is fastest on a CPU.",
            "Activations, embeddings and head are held in it.",
        ),
    ] = "auto"


class Lora(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained."""

    rank: Annotated[
        int,
        _about(
            "Rank",
            "Width of the two thin matrices added to each target.",
            "16 bytes a parameter with 32-bit AdamW.",
            ge=1,
            le=1024,
        ),
    ] = 16
    alpha: Annotated[
        float,
        _about(
            "Alpha", "The update is scaled by alpha / rank (by alpha / √rank with rsLoRA).", gt=0, le=8192
        ),
    ] = 32.0
    dropout: Annotated[
        float,
        _about(
            "Dropout",
            "Drops inputs of the adapter while training; 0 is faster, 0.05 to 0.1 helps small data.",
            "Above 0 each target keeps a byte for each element of its input.",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        _about(
            "Target modules",
            "all-linear, kinds (q_proj), or kinds in a range of layers (8-23.q_proj, 0-3.all-linear).",
            "More targets: more adapter, gradient and optimizer bytes.",
            min_length=1,
        ),
    ] = (ALL_LINEAR,)
    rank_pattern: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=1024)]],
        _about(
            "Rank by pattern",
            "Ranks of their own, by target pattern: 8-23.q_proj = 32; of two that fit, the later holds.",
        ),
    ] = {}
    alpha_pattern: Annotated[
        dict[str, Annotated[float, Meta(gt=0, le=8192)]],
        _about("Alpha by pattern", "Alphas of their own, by target pattern: 8-23.q_proj = 64."),
    ] = {}
    use_rslora: Annotated[
        bool, _about("rsLoRA", "Scale by alpha / √rank, which keeps high ranks learning.")
    ] = False
    use_dora: Annotated[
        bool,
        _about(
            "DoRA",
            "Train magnitude and direction apart: often better at low rank, always slower.",
            "Rebuilds each target's weight in 16 bits in the forward pass.",
        ),
    ] = False
    token_rows: Annotated[
        tuple[str, ...],
        _about(
            "Token rows",
            "Tokens whose rows of embedding and head are trained too: those a base model has never learned.",
            "A row as wide as the model for each, and one more where the head is not tied.",
            max_length=256,
        ),
    ] = ()


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data file, folder or hub dataset."""

    path: Annotated[str, _about("Path", "A file, a folder of files, or a hub dataset id.", min_length=1)]
    format: Annotated[
        Literal[
            "auto",
            "messages",
            "sharegpt",
            "alpaca",
            "prompt-completion",
            "question-answer",
            "label",
            "preference",
            "text",
        ],
        _about("Format", "auto looks at the first rows and says why."),
    ] = "auto"
    columns: Annotated[
        dict[str, str],
        _about("Columns", "Which column plays which part, where the names are your own: prompt, completion."),
    ] = {}
    weight: Annotated[
        float, _about("Weight", "How often each row is seen, relative to other sources.", gt=0, le=1000)
    ] = 1.0


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it learns from."""

    sources: Annotated[
        tuple[Source, ...], _about("Sources", "The files to learn from, each with its format and weight.")
    ] = ()
    validation_path: Annotated[
        str, _about("Validation file", "A file to validate on; empty takes a fraction of the sources.")
    ] = ""
    validation_fraction: Annotated[
        float, _about("Validation fraction", "Share of the rows held back to validate on.", ge=0, lt=1)
    ] = 0.05
    max_length: Annotated[
        int,
        _about(
            "Sequence length",
            "Tokens in one row; longer samples are treated as too_long says.",
            "Activations and loss grow in proportion.",
            ge=16,
            le=1_048_576,
        ),
    ] = 1024
    too_long: Annotated[
        Literal["drop", "cut-left", "cut-right", "split"],
        _about(
            "Too long",
            "A sample longer than a row is dropped, cut at an end, or split after the last answer that fits.",
        ),
    ] = "cut-right"
    packing: Annotated[
        bool,
        _about(
            "Packing",
            "Several whole samples in one row, kept apart: no padding is computed.",
            "Every row is as long as max_length, so the peak is reached at once.",
        ),
    ] = True
    preferences: Annotated[
        Literal["refuse", "chosen"],
        _about(
            "Preference data",
            "Rows with a chosen and a rejected answer, or rated good or bad: refuse them, or train on the "
            "chosen and good answers only.",
        ),
    ] = "refuse"
    train_on: Annotated[
        Literal["assistant", "everything"],
        _about("Train on", "assistant: only what the model should learn to say."),
    ] = "assistant"
    thinking: Annotated[
        Thinking,
        _about(
            "Thinking",
            "enable_thinking of the template. auto: on for rows with reasoning, else off; off leaves it out.",
        ),
    ] = "auto"
    reasoning_in_loss: Annotated[
        bool,
        _about("Reasoning in the loss", "Learn the reasoning too; else it is only read before the answer."),
    ] = True


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How it learns."""

    micro_batch: Annotated[
        int,
        _about("Micro-batch", "Rows in one forward pass.", "Activations grow in proportion.", ge=1, le=4096),
    ] = 1
    gradient_accumulation: Annotated[
        int,
        _about(
            "Gradient accumulation",
            "Forward passes an optimizer step: effective batch = micro-batch × accumulation.",
            "Free: the same memory at any value.",
            ge=1,
            le=65536,
        ),
    ] = 8
    epochs: Annotated[float, _about("Epochs", "Passes over the data.", gt=0, le=1000)] = 2.0
    max_steps: Annotated[
        int,
        _about("Most steps", "Stop after this many optimizer steps; 0 goes by epochs.", ge=0, le=_MANY_STEPS),
    ] = 0
    learning_rate: Annotated[float, _about("Learning rate", "Peak learning rate.", gt=0, le=1)] = 2e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        _about("Schedule", "How the learning rate falls after the warm-up."),
    ] = "cosine"
    warmup: Annotated[
        float, _about("Warm-up", "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    ] = 0.03
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"],
        _about(
            "Optimizer",
            "AdamW; 8-bit states save memory, paged ones survive a spike by moving to host memory.",
            "Eight bytes a trained parameter, two with 8-bit states.",
        ),
    ] = "paged_adamw_8bit"
    weight_decay: Annotated[
        float, _about("Weight decay", "Pull of the adapter towards zero.", ge=0, le=1)
    ] = 0.0
    max_grad_norm: Annotated[
        float, _about("Clip gradients", "Largest gradient norm; 0 does not clip.", ge=0, le=1000)
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool,
        _about(
            "Checkpoint activations",
            "Recompute each layer in the backward pass: about a third slower.",
            "Keeps one hidden state a layer instead of every activation.",
        ),
    ] = True
    log_every: Annotated[
        int, _about("Log every", "Steps between two points of the loss graph.", ge=1, le=_MANY_STEPS)
    ] = 1
    evaluate_every: Annotated[
        int,
        _about(
            "Evaluate every", "Steps between two validations; 0 is at each epoch's end.", ge=0, le=_MANY_STEPS
        ),
    ] = 0
    checkpoint_every: Annotated[
        int,
        _about(
            "Checkpoint every",
            "Steps between two checkpoints; 0 is at each epoch's end.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    keep_checkpoints: Annotated[
        int, _about("Keep checkpoints", "How many to keep, besides the best.", ge=1, le=1000)
    ] = 2
    early_stopping: Annotated[
        int,
        _about(
            "Early stopping",
            "Stop after this many validations without improvement; 0 never.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    sample_prompts: Annotated[
        tuple[str, ...], _about("Sample prompts", "Prompts answered at each validation, kept by step.")
    ] = ()
    seed: Annotated[
        int, _about("Seed", "Order of the data, dropout and initial adapter.", ge=0, lt=2**32)
    ] = 42


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every decision that defines a run. A preset is the same, in part."""

    name: Annotated[str, _about("Name", "What the run is called in lists.", max_length=80)] = ""
    note: Annotated[str, _about("Note", "Why it is as it is.")] = ""
    model: Model = Model()
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    data: Data = Data()
    training: Training = Training()

    @property
    def effective_batch(self) -> int:
        """Rows an optimizer step learns from."""
        return self.training.micro_batch * self.training.gradient_accumulation
