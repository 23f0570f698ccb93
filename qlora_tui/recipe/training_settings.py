"""The settings of the optimization, and how a setting is declared. Part of :mod:`.schema`."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

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
Checkpointing = Literal["auto", "on", "off", "offload"]
"""Gradient checkpointing.

``auto`` recomputes only layers whose activations do not fit in the free memory. ``offload`` recomputes every
layer, and keeps the layers' inputs in host memory.
"""
_MANY_STEPS = 10_000_000
"""A bound that no run reaches, so that a typo is an error instead of an endless run."""


def about(label: str, help_: str, memory: str = "", **bounds: Any) -> Meta:
    """Declare a setting: its label, its one-line help, its effect on memory, and its bounds."""
    return Meta(title=label, description=help_, extra={"memory": memory}, **bounds)


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of the optimization."""

    micro_batch_size: Annotated[
        int,
        about(
            "Micro-batch size",
            "Sequences in one forward pass.",
            "Activations grow in proportion to the micro-batch.",
            ge=1,
            le=4096,
        ),
    ] = 1
    gradient_accumulation: Annotated[
        int,
        about(
            "Gradient accumulation",
            "Forward passes per optimizer step. Effective batch = micro-batch size × accumulation.",
            "The same at any value.",
            ge=1,
            le=65536,
        ),
    ] = 8
    auto_micro_batch: Annotated[
        bool,
        about(
            "Auto micro-batch",
            "On a GPU, use a larger micro-batch and less accumulation if that is faster and free memory "
            "allows. The effective batch stays the same.",
            "Uses only free memory.",
        ),
    ] = True
    gpus: Annotated[
        int,
        about(
            "GPUs",
            "Number of GPUs on this machine that share the micro-batches of each step. Each GPU holds the "
            "whole model, and the result is the same as on one GPU. 0: all GPUs.",
            "Each GPU needs as much memory as a single GPU would.",
            ge=0,
            le=64,
        ),
    ] = 1
    epochs: Annotated[
        float,
        about(
            "Epochs",
            "Passes over the data. Use fewer if the validation loss rises before the end.",
            gt=0,
            le=1000,
        ),
    ] = 2.0
    max_steps: Annotated[
        int,
        about(
            "Max steps",
            "Stop after this many optimizer steps, unless the epochs end first. 0: no limit.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    learning_rate: Annotated[
        float,
        about(
            "Learning rate",
            "Peak rate, usually 1e-4 to 1e-3. Lower it if the loss jumps; raise it if the loss hardly falls.",
            gt=0,
            le=1,
        ),
    ] = 2e-4
    lr_scheduler: Annotated[
        Literal["cosine", "linear", "polynomial", "cosine_with_restarts", "wsd", "constant"],
        about(
            "LR scheduler",
            "How the learning rate decays after warmup. cosine_with_restarts: repeatedly (LR cycles; arXiv "
            "1608.03983). wsd: only in the last steps (arXiv 2405.18392). constant: not at all.",
        ),
    ] = "cosine"
    warmup_ratio: Annotated[
        float,
        about(
            "Warmup ratio",
            "Share of the steps, at the start, in which the learning rate rises to its peak.",
            ge=0,
            lt=1,
        ),
    ] = 0.03
    optimizer: Annotated[
        RecipeOptimizer,
        about(
            "Optimizer",
            "auto: AdamW with states in 32 bits if memory allows, else paged AdamW in 8 bits. adamw: 32 "
            "bits. paged: states move to host memory while GPU memory is short. lion: use a third of "
            "AdamW's learning rate (arXiv 2302.06675). adafactor: almost no states.",
            "Bytes per trained parameter: AdamW 8, lion 4, a quarter in 8 bits, adafactor near 0.",
        ),
    ] = "auto"
    weight_decay: Annotated[float, about("Weight decay", "AdamW weight decay.", ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[
        float, about("Max grad norm", "Clip gradients to this norm. 0: no clipping.", ge=0, le=1000)
    ] = 1.0
    gradient_checkpointing: Annotated[
        Checkpointing,
        about(
            "Gradient checkpointing",
            "Recompute layers in the backward pass. auto: only those whose activations do not fit in free "
            "memory. on: every layer, about a third slower. off: none. offload: every layer, with its input "
            "kept in host memory, for long sequences on a GPU.",
            "Keeps one hidden state per recomputed layer instead of every activation; with offload, only "
            "two in all.",
        ),
    ] = "auto"
    first_step_differs: Annotated[
        Literal["stop", "continue"],
        about(
            "Step check",
            "What to do if loss and gradients of the first step differ from transformers and peft even "
            "without qlora-tui's faster code. stop: train nothing. continue: train, with results that may "
            "be wrong.",
        ),
    ] = "stop"
    log_every: Annotated[
        int, about("Log every", "Steps between points of the loss graph.", ge=1, le=_MANY_STEPS)
    ] = 1
    eval_every: Annotated[
        int,
        about("Eval every", "Steps between evaluations. 0: at the end of each epoch.", ge=0, le=_MANY_STEPS),
    ] = 0
    checkpoint_every: Annotated[
        int,
        about(
            "Checkpoint every",
            "Steps between checkpoints. 0: at the end of each epoch.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    keep_checkpoints: Annotated[
        int,
        about("Keep checkpoints", "Checkpoints to keep in addition to the best.", ge=1, le=1000),
    ] = 2
    early_stopping: Annotated[
        int,
        about(
            "Early stopping",
            "Stop after this many evaluations without improvement. 0: never.",
            ge=0,
            le=_MANY_STEPS,
        ),
    ] = 0
    sample_prompts: Annotated[
        tuple[str, ...],
        about(
            "Sample prompts",
            "Prompts that the model answers at each evaluation. It always chooses the most likely token, "
            "as with `chat --greedy`.",
        ),
    ] = ()
    general_prompts: Annotated[
        int,
        about(
            "General prompts",
            "Number of general prompts (at most 32) on which each evaluation measures how far the model has "
            "moved from its base (forgetting). Each evaluation takes as long as training on 50 tokens per "
            "prompt. Generating the base's answers at the start, and the model's at the end, each takes as "
            "long as training on 250 tokens per prompt. 0: none. 24 gives a more precise figure.",
            ge=0,
            le=32,
        ),
    ] = 12
    task_prompts: Annotated[
        int,
        about(
            "Task prompts",
            "Validation prompts that base and adapter answer at the end, if answers can be right or wrong: "
            "JSON, tool calls, a few words. If the answers are labels, up to 1,000 rows are predicted. "
            "Takes at most 3% of the run's time: prompts that are not answered by then are left out. 0: "
            "none.",
            ge=0,
            le=1000,
        ),
    ] = 64
    forgetting_weight: Annotated[
        float,
        about(
            "Forgetting weight",
            "To choose the best checkpoint and for early stopping, the divergence from the base on general "
            "prompts, times this weight, is added to the validation loss. 0: only the validation loss "
            "counts.",
            ge=0.0,
            le=100.0,
        ),
    ] = 0.0
    replay_share: Annotated[
        float,
        about(
            "Replay share",
            "Share of the training samples that are the base's own answers to general prompts, which keeps "
            "the model close to its base on other topics. 0: none. Use 0.1 if the model forgets too much. "
            "Up to 48 answers are generated once per run; each takes about as long as training on 100 "
            "tokens.",
            ge=0.0,
            le=0.9,
        ),
    ] = 0.0
    preference_beta: Annotated[
        float,
        about(
            "Preference beta",
            "Strength of a preference method. orpo: weight of the odds ratio added to the loss of the "
            "chosen answer. dpo and kto: the higher, the closer the model stays to its base. simpo: scale "
            "of the reward. 0: the paper's value (0.1; simpo: 2).",
            ge=0.0,
            le=100.0,
        ),
    ] = 0.0
    simpo_gamma: Annotated[
        float,
        about(
            "SimPO gamma",
            "Margin by which simpo wants the chosen answer's reward to exceed the rejected one's; about "
            "half of beta.",
            ge=0.0,
            le=100.0,
        ),
    ] = 1.0
    seed: Annotated[
        int, about("Seed", "Seeds the data order, dropout and the initial adapter.", ge=0, lt=2**32)
    ] = 42
    lora_plus_ratio: Annotated[
        float,
        about(
            "LoRA+ ratio",
            "Learning rate of the B matrices as a multiple of Learning rate (arXiv 2402.12354). 1: the "
            "same. If the task is hard for the base, try up to 16, with half the Learning rate.",
            ge=1,
            le=1000,
        ),
    ] = 1.0
    embedding_learning_rate: Annotated[
        float,
        about(
            "Embedding LR",
            "With Train embeddings: the learning rate of embedding and head, best 2 to 10 times lower than "
            "Learning rate. 0: a tenth of Learning rate.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    neftune_alpha: Annotated[
        float,
        about(
            "NEFTune alpha",
            "Noise on the embeddings while training, against overfitting to few conversations (arXiv "
            "2310.05914). Try 5 to 15. The training loss then includes the noise. 0: none.",
            ge=0,
            le=1000,
        ),
    ] = 0.0
    lr_cycles: Annotated[
        int,
        about(
            "LR cycles",
            "With cosine_with_restarts: how often the learning rate falls from its peak to zero.",
            ge=1,
            le=1000,
        ),
    ] = 2
    lr_power: Annotated[
        float,
        about(
            "LR power",
            "With polynomial: the peak learning rate is multiplied by the remaining share of the steps, "
            "raised to this power. 1 is linear.",
            gt=0,
            le=10,
        ),
    ] = 2.0
    lr_decay_share: Annotated[
        float,
        about(
            "LR decay share",
            "With wsd: share of the steps, at the end, in which the learning rate falls to zero.",
            gt=0,
            lt=1,
        ),
    ] = 0.2
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio", "mlflow"],
        about(
            "Report to",
            "Also send steps, evaluations and settings to a tracker that is installed: tensorboard, trackio "
            "and mlflow on this machine, wandb on its server.",
        ),
    ] = "none"
