"""The words of the app and what they mean: shown where the cursor is, and written to ``docs/glossary.md``."""

from __future__ import annotations

from qlora_tui.formatting import capitalize

GLOSSARY: dict[str, str] = {
    "recipe": (
        "every decision that defines a run: model, quantization, LoRA, data, training. Typed, validated, TOML"
    ),
    "preset": (
        "a named part of a recipe in TOML, put over the defaults; shipped in `presets/`, yours in "
        "your config folder"
    ),
    "draft": "the recipe that is being edited in the app; saved as you edit",
    "layer (of a recipe)": "a partial recipe as nested tables; recipes are layers over the defaults",
    "architecture": (
        "what `config.json` says of a model: its linear modules, shapes and counts. No weights needed"
    ),
    "estimate": "predicted memory of one training step of a recipe, itemized",
    "band": "the range that the real peak is expected in",
    "run": "a frozen recipe and its folder: events, telemetry, log, checkpoints, adapter",
    "attempt": "one start of a run's trainer; a resume or a retry is another attempt",
    "runner": "the background process that takes queued runs and supervises their trainer",
    "trainer": "the process that holds torch and the GPU for one run",
    "engine": (
        "a child process of the app for what needs torch or transformers: previews, traced steps, chat"
    ),
    "event": "one line of `events.jsonl`",
    "telemetry": "the GPU, sampled once a second",
    "heartbeat": "a small file by which the trainer shows that it is alive, and how far it is",
    "lost": "state of a run whose trainer is gone without a last event; `resume` continues it",
    "probe": "a step with the largest batch, before training, that shows whether memory is enough",
    "packing": (
        "several samples in one sequence of at most `data.max_length` tokens, which do not attend "
        "to each other"
    ),
    "streamed layers": (
        "layers whose frozen weights wait in host memory and are copied to the GPU for each pass, two at a "
        "time, so that a base larger than the GPU can be trained"
    ),
    "preference method": (
        "how a run learns from answers that are compared or rated (`data.preferences`): ORPO, DPO or SimPO "
        "from pairs of a chosen and a rejected answer, KTO from answers rated good or bad"
    ),
    "reward": (
        "of an answer, under a preference method: β times its log-probability minus that of the reference "
        "(DPO, KTO), or times its mean log-probability (ORPO, SimPO). Their mean difference is the margin; "
        "right is the share of comparisons in which the better answer has the higher one"
    ),
    "reference (of DPO and KTO)": (
        "the model before the run: the base with the adapter off, or the adapter that is trained further"
    ),
    "padding-free": (
        "a micro-batch is one sequence of isolated samples, without padding between them; with "
        "`data.packing` off too"
    ),
    "loss mask": (
        "for each token, whether it is in the loss, so that the model learns to write it: `loss_mask` in "
        "code. The Data screen calls these tokens to learn and the others only read, and shows them bold and "
        "underlined; `trained_tokens` counts them"
    ),
    "smoothed loss": (
        'the running mean of the training loss, over a thirtieth of its steps (4 to 100); "loss" alone '
        "is that of the last step"
    ),
    "best validation": "★: the lowest loss on the validation rows after training began, and its step",
    "micro-batch": "sequences that go through the model at once",
    "effective batch": (
        "micro-batch × gradient accumulation: sequences for each optimizer step; `batch 1 × 8` on the screens"
    ),
    "verified": "compared with transformers and peft on the model at hand, and equal within rounding",
    "effect": "how far the adapter moves the model: KL of next tokens, change of weights by layer",
    "forgetting": (
        "how far the model has moved from its base on general prompts: the KL divergence in nats for each "
        "token of the base's answers to them. 0: as the base; about 1: it answers everything in the voice of "
        "the data; above 2: its other abilities are at risk"
    ),
    "NF4": (
        "4-bit NormalFloat, the storage of the QLoRA paper; the weights are expanded to the compute "
        "dtype for each product"
    ),
    "double quantization": "the scales of NF4 blocks are quantized too",
    "LoRA": (
        "low-rank adaptation: the model's weights stay frozen, and for each target module two thin "
        "matrices A and B are trained, whose product is added to its weight"
    ),
    "adapter": "the trained matrices of LoRA, saved as a few MiB next to the model",
    "target modules": "the linear layers of the model that get an adapter; `all-linear` is every one",
    "rank": (
        "the number of columns of A and B. A higher rank can learn more and takes more memory; 8 to "
        "32 is enough for most data"
    ),
    "alpha": (
        "how strongly the adapter counts: its update is multiplied by alpha / rank. Twice the rank "
        "is common; double both together to keep the scale"
    ),
    "dropout": (
        "the share of the adapter's inputs that are set to zero at random in training, against "
        "overfitting on small data; 0 is fastest"
    ),
    "rsLoRA": (
        "rank-stabilized LoRA: the update is multiplied by alpha / √rank, so that a high rank does "
        "not learn more slowly"
    ),
    "DoRA": (
        "weight-decomposed LoRA: the length of each row of a weight is trained apart from its "
        "direction. Often better at low ranks, always slower"
    ),
    "embed": (
        "whether the embedding and the output head are trained in whole too, at their own rate: for a new "
        "language or domain from plain text. They take much more memory than an adapter"
    ),
    "activations": (
        "what the layers compute on the way to the loss; the backward pass needs it, so it is kept "
        "or computed again"
    ),
    "gradient checkpointing": (
        "only the input of each layer is kept in the forward pass; its activations are computed "
        "again in the backward pass. Saves most of the memory, about a third slower; `recompute` on Memory"
    ),
    "gradient": "how the loss changes with each trained parameter; the optimizer follows it downhill",
    "gradient accumulation": (
        "micro-batches whose gradients are added up before the optimizer makes one step: a larger "
        "batch without more memory"
    ),
    "optimizer states": (
        "two averages that AdamW keeps for each trained parameter; 8-bit optimizers store them in a byte each"
    ),
    "logits": (
        "a score for every token of the vocabulary at every position, from which the loss is computed"
    ),
    "q_proj": "the query projection of attention: what each token looks for in the tokens before it",
    "k_proj": "the key projection of attention: by what each token is found",
    "v_proj": "the value projection of attention: what a token passes on to those that find it",
    "o_proj": "the output projection of attention: how what was found changes the token",
    "gate_proj": "the gate of the feed-forward part: which of its features a token turns on",
    "up_proj": "the wide side of the feed-forward part: the features of a token, much of what a model knows",
    "down_proj": "the way back from the feed-forward part: how those features change the token",
    "experts.gate_up_proj": (
        "gate and up of all routed experts of a layer: the features that a token turns on in its experts"
    ),
    "experts.down_proj": "the way back from all routed experts of a layer, each with its own update",
    "allocator slack": "memory that PyTorch has taken from the GPU and holds for later tensors",
}
"""Term to meaning: a phrase without a capital letter and a period, in which `this` is code."""


def explain(term: str) -> str:
    """Return the meaning as a sentence, without the marks of code."""
    meaning = GLOSSARY[term].replace("`", "")
    return f"{capitalize(meaning)}."
