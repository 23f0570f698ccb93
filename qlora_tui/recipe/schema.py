"""Every setting of a run, declared once.

From these declarations come the TOML keys, ``--set section.key=value``, the forms of the app, validation and
``qlora-tui presets reference``. A setting's ``Meta`` holds its label (``title``), its one-line help
(``description``), its bounds, and its effect on memory (``extra["memory"]``).
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from qlora_tui.recipe.preference_methods import (
    PAIR_METHODS,
    PREFERENCE_TRAITS,
    PreferenceMethod,
    PreferenceTraits,
)

ALL_LINEAR = "all-linear"
"""Target pattern of every linear module of the language model except the output head. See :mod:`.targets`."""

Thinking = Literal["auto", "on", "off"]
"""Thinking mode.

``auto`` turns thinking on for a training row that has reasoning; for a prompt it is the template's default.
"""
RecipeOptimizer = Literal[
    "auto",
    "adamw",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
]
Preferences = Literal["refuse", "chosen", PreferenceMethod]
"""How a run uses preference data; a method trains on it."""
Checkpointing = Literal["auto", "on", "off", "offload"]
"""Gradient checkpointing.

``auto`` recomputes only layers whose activations do not fit in the free memory. ``offload`` recomputes every
layer, and keeps the layers' inputs in host memory.
"""

_MANY_STEPS = 10_000_000
"""A bound that no run reaches, so that a typo is an error instead of an endless run."""


def _about(label: str, help_: str, memory: str = "", **bounds: Any) -> Meta:
    return Meta(title=label, description=help_, extra={"memory": memory}, **bounds)


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base model and its attention."""

    id: Annotated[str, _about("Model", "A Hub id, a folder, or a GGUF file.")] = ""
    revision: Annotated[str, _about("Revision", "Branch, tag or commit of a Hub model.")] = "main"
    attention: Annotated[
        Literal["auto", "sdpa", "flash", "eager"],
        _about(
            "Attention",
            "Attention kernel. auto: flash (one call for all samples of a packed sequence) if the GPU "
            "supports it, otherwise sdpa (sample by sample).",
            "eager keeps the full score matrix: tokens squared, per layer.",
        ),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "torch"],
        _about(
            "Kernels",
            "auto: Triton kernels for norms, rotary positions and gated MLPs, on a GPU if they compile and "
            "match torch. torch: no Triton kernels.",
            "With Triton, these need no temporary copies.",
        ),
    ] = "auto"
    chat_template: Annotated[
        Literal["auto", "chatml", "llama-3", "alpaca", "plain"],
        _about("Chat template", "auto uses the tokenizer's template; a base model without one gets chatml."),
    ] = "auto"


class Quantization(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the frozen base weights are stored."""

    method: Annotated[
        Literal["nf4", "fp4", "int8", "none"],
        _about(
            "Method",
            "nf4 is QLoRA; none keeps 16 bits per weight.",
            "Per linear weight: half a byte with nf4 and fp4, one with int8, two with none.",
        ),
    ] = "nf4"
    double_quantization: Annotated[
        bool,
        _about("Double quantization", "Quantize the scales too.", "Saves 0.37 bits per weight."),
    ] = True
    experts: Annotated[
        bool,
        _about(
            "Quantize experts",
            "With nf4 and fp4, quantize the experts of a mixture of experts too. false keeps them in 16 "
            "bits.",
            "Experts are most of such a model's weights: half a byte per weight, or two bytes in 16 bits.",
        ),
    ] = True
    skip: Annotated[
        tuple[str, ...],
        _about(
            "Skip",
            "Linear modules that stay in 16 bits, by target pattern: o_proj, or all of some layers "
            "(0,29.all-linear). estimate --quality finds layers worth it.",
            "Two bytes per weight of these modules.",
        ),
    ] = ()
    compute_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _about(
            "Compute dtype",
            "auto: bfloat16 from compute capability 8.0, float16 below it, the fastest dtype on a CPU.",
            "Activations, embeddings and the head use it.",
        ),
    ] = "auto"
    streamed_layers: Annotated[
        int,
        _about(
            "Streamed layers",
            "Layers whose frozen weights stay in host memory and are copied to the GPU for each pass: for a "
            "model that does not fit, at the cost of speed. 0: none.",
            "Two of them are on the GPU at a time; all of them take host memory.",
            ge=0,
            le=1024,
        ),
    ] = 0


class Lora(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The adapter, which is trained."""

    rank: Annotated[
        int,
        _about(
            "Rank",
            "Rank of the two matrices added to each target module.",
            "16 bytes per adapter parameter with 32-bit AdamW.",
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
            "Dropout on the adapter's input. 0 is faster; 0.05 to 0.1 helps with little data.",
            "Above 0, each target keeps one byte per element of its input.",
            ge=0,
            lt=1,
        ),
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        _about(
            "Target modules",
            "all-linear, module names (q_proj), or names in a range of layers (8-23.q_proj, 0-3.all-linear).",
            "More targets: more memory for adapter, gradients and optimizer.",
            min_length=1,
        ),
    ] = (ALL_LINEAR,)
    rank_pattern: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=1024)]],
        _about(
            "Rank by pattern",
            "Rank overrides by target pattern (8-23.q_proj = 32). If two patterns match, the later wins.",
        ),
    ] = {}
    alpha_pattern: Annotated[
        dict[str, Annotated[float, Meta(gt=0, le=8192)]],
        _about("Alpha by pattern", "Alpha overrides by target pattern (8-23.q_proj = 64)."),
    ] = {}
    use_rslora: Annotated[
        bool, _about("rsLoRA", "Scale by alpha / √rank, which keeps high ranks stable.")
    ] = False
    use_dora: Annotated[
        bool,
        _about(
            "DoRA",
            "Train magnitude and direction separately: often better at low rank, always slower.",
            "Rebuilds each target's weight in 16 bits during the forward pass.",
        ),
    ] = False
    init_from: Annotated[
        str,
        _about(
            "Start from",
            "An adapter to train further: a run or an adapter's folder, which stays as it is. Rank, alpha "
            "and targets must be those of the adapter. Empty: a new adapter.",
        ),
    ] = ""
    trainable_tokens: Annotated[
        tuple[str, ...],
        _about(
            "Trainable tokens",
            "Tokens whose embedding and head rows are trained too: tokens the base model never learned.",
            "One row of hidden size per token, two if the head is not tied to the embedding.",
            max_length=256,
        ),
    ] = ()
    train_embeddings: Annotated[
        bool,
        _about(
            "Train embeddings",
            "Train the whole input embedding and output head too, at their own rate (Embedding LR): for a "
            "new language or domain from plain text (continued pretraining).",
            "4 bytes per weight of both, the same for gradients, plus the optimizer's states.",
        ),
    ] = False


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data file, folder or Hub dataset."""

    path: Annotated[str, _about("Path", "A file, a folder of files, or a Hub dataset id.", min_length=1)]
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
        _about("Format", "auto decides from the first rows."),
    ] = "auto"
    columns: Annotated[
        dict[str, str],
        _about("Columns", "Which column holds which part, for your own column names."),
    ] = {}
    weight: Annotated[
        float,
        _about("Weight", "How often rows of this source are seen, relative to other sources.", gt=0, le=1000),
    ] = 1.0
    excluded_rows: Annotated[
        str,
        _about(
            "Excluded rows",
            'Rows that are left out, by number: "3, 17, 40-45". In a folder that means these rows of every '
            'file; "a.jsonl: 3, 17; more/b.jsonl: 40-45" names rows of two of its files. Rows of JSONL and '
            "text files are numbered by their first line.",
        ),
    ] = ""


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training data."""

    sources: Annotated[
        tuple[Source, ...], _about("Sources", "Training files, each with its format and weight.")
    ] = ()
    validation_path: Annotated[
        str, _about("Validation file", "A file to validate on. Empty: a fraction of the sources.")
    ] = ""
    validation_fraction: Annotated[
        float, _about("Validation fraction", "Share of the rows set aside for validation.", ge=0, lt=1)
    ] = 0.05
    validation_seed: Annotated[
        int,
        _about(
            "Validation seed",
            "Seed that chooses the validation rows of a fraction: set it to compare runs with other seeds on "
            "the same rows. 0: that of the training (training.seed).",
            ge=0,
            lt=2**32,
        ),
    ] = 0
    max_length: Annotated[
        int,
        _about(
            "Sequence length",
            "Tokens in one sequence. overflow decides what happens to longer samples.",
            "Activations and loss grow in proportion.",
            ge=16,
            le=1_048_576,
        ),
    ] = 1024
    overflow: Annotated[
        Literal["drop", "cut-left", "cut-right", "split"],
        _about(
            "Overflow",
            "Longer samples: drop them, cut one end, or split after the last answer that fits.",
        ),
    ] = "cut-right"
    packing: Annotated[
        bool,
        _about(
            "Packing",
            "Put several whole samples in one sequence without attention between them: no padding.",
            "Sequences are nearly full, so every step is close to the peak.",
        ),
    ] = True
    preferences: Annotated[
        Preferences,
        _about(
            "Preference data",
            "Rows with chosen and rejected answers, or with ratings: refuse them, train on the chosen and "
            "well-rated answers only, or train on both kinds: pairs with orpo, dpo or simpo, rated answers "
            "with kto, which takes pairs too.",
            "A pair is two sequences. dpo and kto also compute the base without gradients, which takes time.",
        ),
    ] = "refuse"
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        _about(
            "Bad rows",
            "Rows that cannot be read or have no text to train on, such as invalid JSON: refuse to train "
            "while there are any, or skip them. A file that cannot be read to its end is always refused.",
        ),
    ] = "refuse"
    train_on: Annotated[
        Literal["assistant", "everything"],
        _about("Train on", "assistant: only the assistant's turns are in the loss."),
    ] = "assistant"
    thinking: Annotated[
        Thinking,
        _about(
            "Thinking",
            "The template's enable_thinking. auto: on for rows with reasoning, off for others. off drops it.",
        ),
    ] = "auto"
    reasoning_in_loss: Annotated[
        bool,
        _about("Reasoning in the loss", "Include the reasoning in the loss; otherwise it is only context."),
    ] = True


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of the optimization."""

    micro_batch_size: Annotated[
        int,
        _about(
            "Micro-batch size",
            "Sequences in one forward pass.",
            "Activations grow in proportion.",
            ge=1,
            le=4096,
        ),
    ] = 1
    gradient_accumulation: Annotated[
        int,
        _about(
            "Gradient accumulation",
            "Forward passes per optimizer step. Effective batch = micro-batch size × accumulation.",
            "The same at any value.",
            ge=1,
            le=65536,
        ),
    ] = 8
    auto_micro_batch: Annotated[
        bool,
        _about(
            "Auto micro-batch",
            "On a GPU, use a larger micro-batch and less accumulation if that is faster and free memory "
            "allows. The effective batch stays the same.",
            "Uses only free memory.",
        ),
    ] = True
    gpus: Annotated[
        int,
        _about(
            "GPUs",
            "GPUs of this machine that share the micro-batches of each step; what is learned stays the same. "
            "Each holds the whole model. 0: all of them.",
            "The same on each GPU as on one.",
            ge=0,
            le=64,
        ),
    ] = 1
    epochs: Annotated[float, _about("Epochs", "Passes over the data.", gt=0, le=1000)] = 2.0
    max_steps: Annotated[
        int,
        _about(
            "Max steps",
            "Stop after this many optimizer steps, unless the epochs end first. 0: no limit.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    learning_rate: Annotated[
        float,
        _about(
            "Learning rate",
            "Peak rate, usually 1e-4 to 1e-3. Lower it if the loss jumps; raise it if the loss hardly falls.",
            gt=0,
            le=1,
        ),
    ] = 2e-4
    lr_scheduler: Annotated[
        Literal["cosine", "linear", "polynomial", "cosine_with_restarts", "wsd", "constant"],
        _about(
            "LR scheduler",
            "How the learning rate decays after warmup. cosine_with_restarts: LR cycles times (arXiv "
            "1608.03983). wsd: only in the last steps (arXiv 2405.18392). constant: not at all.",
        ),
    ] = "cosine"
    warmup_ratio: Annotated[
        float, _about("Warmup ratio", "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    ] = 0.03
    optimizer: Annotated[
        RecipeOptimizer,
        _about(
            "Optimizer",
            "auto: AdamW with states in 32 bits if memory allows, else paged in 8 bits. adamw: 32 bits. "
            "paged: states move to host memory in a spike; lion (a third of AdamW's rate, arXiv 2302.06675); "
            "adafactor.",
            "Bytes per trained parameter: AdamW 8, lion 4, a quarter in 8 bits, adafactor near 0.",
        ),
    ] = "auto"
    weight_decay: Annotated[float, _about("Weight decay", "AdamW weight decay.", ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[
        float, _about("Max grad norm", "Clip gradients to this norm. 0: no clipping.", ge=0, le=1000)
    ] = 1.0
    gradient_checkpointing: Annotated[
        Checkpointing,
        _about(
            "Gradient checkpointing",
            "Recompute layers in the backward pass. auto: only those whose activations do not fit in free "
            "memory. on: every layer, about a third slower. off: none. offload: every layer, with its input "
            "kept in host memory, for long sequences on a GPU.",
            "Keeps one hidden state per recomputed layer instead of every activation; with offload, two.",
        ),
    ] = "auto"
    first_step_differs: Annotated[
        Literal["stop", "continue"],
        _about(
            "Step check",
            "What to do if loss and gradients of the first step differ from transformers and peft even "
            "without qlora-tui's faster code. stop: train nothing. continue: train, with results that may "
            "be wrong.",
        ),
    ] = "stop"
    log_every: Annotated[
        int, _about("Log every", "Steps between points of the loss graph.", ge=1, le=_MANY_STEPS)
    ] = 1
    eval_every: Annotated[
        int,
        _about("Eval every", "Steps between evaluations. 0: at the end of each epoch.", ge=0, le=_MANY_STEPS),
    ] = 0
    checkpoint_every: Annotated[
        int,
        _about(
            "Checkpoint every",
            "Steps between checkpoints. 0: at the end of each epoch.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    keep_checkpoints: Annotated[
        int,
        _about("Keep checkpoints", "Checkpoints to keep in addition to the best.", ge=1, le=1000),
    ] = 2
    early_stopping: Annotated[
        int,
        _about(
            "Early stopping",
            "Stop after this many evaluations without improvement. 0: never.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    sample_prompts: Annotated[
        tuple[str, ...],
        _about(
            "Sample prompts",
            "Prompts to answer at each evaluation, always with the most likely token (`chat --greedy` too).",
        ),
    ] = ()
    general_prompts: Annotated[
        int,
        _about(
            "General prompts",
            "Number of general prompts (at most 32) on which each evaluation measures how far the model has "
            "moved from its base: what it forgets. Each evaluation takes as long as training on 50 tokens "
            "per prompt; generating the base's answers once, and the model's at the end, as long as on 250 "
            "each. 0: none. 24 gives a more precise figure.",
            ge=0,
            le=32,
        ),
    ] = 12
    task_prompts: Annotated[
        int,
        _about(
            "Task prompts",
            "Validation prompts that base and adapter answer at the end, if answers can be right or wrong: "
            "JSON, tool calls, a few words. If the answers are labels, up to 1,000 rows are decided. Takes "
            "at most 3 % of the run's time: prompts that are not answered by then are left out. 0: none.",
            ge=0,
            le=1000,
        ),
    ] = 64
    forgetting_weight: Annotated[
        float,
        _about(
            "Forgetting weight",
            "Weight of the divergence from the base on general prompts next to the validation loss, for "
            "the best checkpoint and early stopping. 0: only the loss counts.",
            ge=0.0,
            le=100.0,
        ),
    ] = 0.0
    replay_share: Annotated[
        float,
        _about(
            "Replay share",
            "Share of the training samples that are the base's own answers to general prompts, which keeps "
            "the model close to its base on other topics. 0: none. Use 0.1 if it forgets too much. Once per "
            "run, generating the answers (at most 48) takes as long as training on about 100 tokens each.",
            ge=0.0,
            le=0.9,
        ),
    ] = 0.0
    preference_beta: Annotated[
        float,
        _about(
            "Preference beta",
            "Strength of a preference method. orpo: weight of the odds ratio added to the loss of the "
            "chosen answer. dpo and kto: the higher, the closer the model stays to its base. simpo: scale "
            "of the reward. 0: the paper's value, which is 0.1 (simpo: 2).",
            ge=0.0,
            le=100.0,
        ),
    ] = 0.0
    simpo_gamma: Annotated[
        float,
        _about(
            "SimPO gamma",
            "Margin by which simpo wants the chosen answer's reward to exceed the rejected one's; about "
            "half of beta.",
            ge=0.0,
            le=100.0,
        ),
    ] = 1.0
    seed: Annotated[
        int, _about("Seed", "Seeds the data order, dropout and the initial adapter.", ge=0, lt=2**32)
    ] = 42
    lora_plus_ratio: Annotated[
        float,
        _about(
            "LoRA+ ratio",
            "Learning rate of the B matrices as a multiple of Learning rate (arXiv 2402.12354): up to 16 if "
            "the task is hard for the base, with half the learning rate. 1: the same.",
            ge=1,
            le=1000,
        ),
    ] = 1.0
    embedding_learning_rate: Annotated[
        float,
        _about(
            "Embedding LR",
            "With Train embeddings: the rate of embedding and head, best 2 to 10 times lower than Learning "
            "rate. 0: a tenth of Learning rate.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    neftune_alpha: Annotated[
        float,
        _about(
            "NEFTune alpha",
            "Noise on the embeddings while training, against overfitting to few conversations (arXiv "
            "2310.05914): 5 to 15. The training loss then includes the noise. 0: none.",
            ge=0,
            le=1000,
        ),
    ] = 0.0
    lr_cycles: Annotated[
        int,
        _about(
            "LR cycles",
            "With cosine_with_restarts: how often the learning rate falls from its peak to zero.",
            ge=1,
            le=1000,
        ),
    ] = 2
    lr_power: Annotated[
        float,
        _about(
            "LR power",
            "With polynomial: the rate is the remaining share of the steps to this power. 1 is linear.",
            gt=0,
            le=10,
        ),
    ] = 2.0
    lr_decay_share: Annotated[
        float,
        _about(
            "LR decay share",
            "With wsd: share of the steps, at the end, in which the learning rate falls to zero.",
            gt=0,
            lt=1,
        ),
    ] = 0.2
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio", "mlflow"],
        _about(
            "Report to",
            "Also send steps, evaluations and settings to a tracker that is installed: tensorboard, trackio "
            "and mlflow on this machine, wandb on its server.",
        ),
    ] = "none"


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting that defines a run. A preset sets some of them."""

    name: Annotated[str, _about("Name", "Name of the run in lists.", max_length=80)] = ""
    note: Annotated[str, _about("Note", "What this recipe is for.")] = ""
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
        """Sequences per optimizer step; if pairs are trained, a sequence holds both sides."""
        return self.training.micro_batch_size * self.training.gradient_accumulation

    @property
    def split_seed(self) -> int:
        """Seed that selects the validation rows."""
        return self.data.validation_seed or self.training.seed

    @property
    def preference_method(self) -> PreferenceMethod | None:
        """The method that trains on preferences; None if the run trains on answers alone."""
        choice = self.data.preferences
        return None if choice == "refuse" or choice == "chosen" else choice

    @property
    def trains_pairs(self) -> bool:
        """Whether a sample of the run is a pair of sequences."""
        return self.data.preferences in PAIR_METHODS

    @property
    def preference_traits(self) -> PreferenceTraits | None:
        """The requirements of the preference method; None if the run trains on answers alone."""
        method = self.preference_method
        return None if method is None else PREFERENCE_TRAITS[method]

    @property
    def learns_answers(self) -> bool:
        """Whether the run makes the answers in its data more likely."""
        traits = self.preference_traits
        return traits is None or traits.learns_answers

    @property
    def keeps_starting_adapter(self) -> bool:
        """Whether the run compares its answers with those of the adapter from which it started."""
        traits = self.preference_traits
        return bool(self.lora.init_from) and traits is not None and traits.uses_reference

    @property
    def rows_per_pass(self) -> int:
        """Sequences of at most ``data.max_length`` tokens in one forward pass."""
        return self.training.micro_batch_size * (2 if self.trains_pairs else 1)
