"""Suggested values of the most important settings, each with a reason and the sources of its figures.

:func:`suggest` derives them from facts alone: the lengths of the samples, the model's architecture, the free
memory, and the results of earlier runs, which :mod:`.suggestion_facts` gathers. If neither a publication nor
a run gives a value for a setting, the setting is unchanged, and its reason says so.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import msgspec

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.data.counted import SampleLengths
from qlora_tui.data.step_plan import count_steps
from qlora_tui.formatting import (
    capitalize,
    format_count,
    format_gib,
    format_loss,
    format_number,
    format_rate,
    pluralize,
)
from qlora_tui.memory import Estimate, check_fit, choose_step, estimate, trainer_execution
from qlora_tui.memory.execution import Device
from qlora_tui.memory.layout import build_layout
from qlora_tui.memory.solver import LENGTH_STEP, RANKS, largest_fitting
from qlora_tui.memory.step_choice import CPU_SHARE
from qlora_tui.recipe.fields import (
    WITHOUT_EFFECT_ON_WEIGHTS,
    fields,
    get_setting,
    replace_setting,
    replace_settings,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.data_checks import KnownLengths, is_padding_free
from qlora_tui.runs.evidence import (
    CAPACITY,
    LIMA,
    LION,
    QLORA,
    TRL,
    UNSLOTH,
    WITHOUT_REGRET,
    PastRun,
    Reference,
)

Topic: TypeAlias = Literal["length", "rank", "epochs", "batch", "rate"]
"""The subject of a suggestion: one setting, or two for the batch."""


_SAMPLES_PER_STEP = 16
"""Batch size of all 7B and 13B runs in the QLoRA paper and of its OASST1 runs at every size (table 9).

Its other 33B and 65B runs use 16 to 64.
"""
_TOO_MANY_PER_STEP = 32
"""Batch size from which LoRA performs worse (LoRA Without Regret; the number is from TRL's guide to it)."""
_SHORT_RUN_STEPS = 100
"""Number of steps of a short run, for which the best learning rate was about 15 instead of 10 times the
rate of full fine-tuning (LoRA Without Regret)."""
_BITS_PER_PARAMETER = 2
"""Bits that a trained parameter can store (Physics of Language Models 3.3, used by LoRA Without Regret)."""
_BITS_PER_TOKEN = 1
"""Usual loss of a language model in bits per token. It limits how much information a token contributes
(same source).
"""
_COMPARED_RANKS = (8, 256)
"""Lowest and highest rank that the QLoRA paper compared. With adapters on all layers, the ranks made no
difference (figure 4).
"""
_HIGHEST_RANK = 512
"""Highest rank that LoRA Without Regret compared."""
_EPOCHS = (1.0, 3.0)
"""Range of epochs that Unsloth's guide recommends. The QLoRA paper's OASST1 runs have 3 epochs: 1,875
steps of 16 out of 9,209 samples."""
_EPOCHS_OF_FEW = (3.0, 15.0)
"""Range of epochs for few samples. LIMA trained for 15 epochs on 1,000 samples, and selected a
checkpoint between epochs 5 and 10.
"""
_FEW_SAMPLES = 1000
"""Number of LIMA's samples."""
_RATES = ((13.5e9, 2e-4), (math.inf, 1e-4))
"""Learning rates, each with the largest number of parameters it applies to. The QLoRA paper uses 2e-4 for
7B and 13B, and 1e-4 for 33B and 65B (table 9)."""
_SMALLEST_MEASURED = 6.5e9
_NO_OTHER_RATE = 0.05
"""Relative difference up to which two rates count as equal, because no source distinguishes them."""
_LION_SHARE = 1 / 3
"""Lion's rate as a share of AdamW's. Its paper recommends a third to a tenth (section 5)."""
_LEAST_RATED = 8
"""Minimum number of rated answers per step; with fewer, a warning is shown before the launch. This program's
own rule.
"""
_PACKED = 1.05
"""Mean number of samples per sequence above which the sequences are called packed."""
_MOST_ROUNDS = 4
"""Maximum number of rounds. All suggestions are derived again until none changes, because a lower rank or a
smaller batch may leave memory for a longer sequence."""
_ALPHAS = (16.0, 32.0)
"""Alphas of the QLoRA paper and of LoRA Without Regret. Both scale by alpha / rank."""
_DECIDES_RATE = (
    *("lora.alpha", "lora.use_rslora", "lora.use_dora", "lora.target_modules"),
    *("lora.init_from", "lora.train_embeddings", "training.lora_plus_ratio", "data.preferences"),
)
"""Settings that affect which learning rate is the best."""


@dataclass(frozen=True)
class SuggestionFacts:
    """The facts from which suggestions are derived."""

    recipe: Recipe
    """The recipe. Its ``training.gpus`` is the number of GPUs that share a step."""
    architecture: Architecture
    device: Device
    device_name: str
    """Name of the device for a sentence, such as ``RTX 3060`` or ``this machine's memory``."""
    free_bytes: int
    """Device memory that nothing else uses."""
    known: KnownLengths
    """Lengths of the training samples before truncation. At least one sample."""
    past: tuple[PastRun, ...] = ()
    outdated: int = 0
    """Number of earlier runs that are ignored because the data files have changed since."""

    @cached_property
    def lengths(self) -> array[int]:
        """Tokens of each sample, in ascending order."""
        return array("I", sorted(array("I", self.known.lengths)))

    @property
    def available_bytes(self) -> int:
        """Memory in bytes that a run may use."""
        return int(self.free_bytes * CPU_SHARE) if self.device.kind == "cpu" else self.free_bytes

    @property
    def memory_words(self) -> str:
        """The available memory in words, such as ``10.9 GiB free``."""
        gib = f"{format_gib(self.available_bytes)} GiB"
        return f"{gib}, half of {self.device_name}" if self.device.kind == "cpu" else f"{gib} free"

    def estimate(self, recipe: Recipe) -> Estimate:
        """Estimate the memory of a recipe. Raises UserError if the model or its targets are not supported."""
        return estimate(recipe, self.architecture, device=self.device)

    def fits(self, recipe: Recipe) -> bool:
        """Return whether a recipe fits in the available memory, with a margin. Raises UserError."""
        return check_fit(self.estimate(recipe), self.available_bytes).fits_with_margin


@dataclass(frozen=True)
class Suggestion:
    """One suggestion: changes of settings, or the reason why nothing is changed."""

    topic: Topic
    label: str
    now: str
    then: str
    """The suggested value as text. Equals ``now`` if nothing changes."""
    reason: str
    """The reason, in sentences with the decisive figures."""
    references: tuple[Reference, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    """New values of settings, by path; empty if the recipe already has them or no value is known."""
    is_known: bool = True
    """Whether a value is known. If not, the reason says why the setting is unchanged."""

    @property
    def change(self) -> str:
        """The change as text, such as ``1,024 → 640``. Without a change, the text is ``16, as suggested``; if
        no value is known, ``16, left unchanged``.
        """
        if self.changes:
            return f"{self.now} → {self.then}"
        return f"{self.now}, {'as suggested' if self.is_known else 'left unchanged'}"

    @property
    def sourced_reason(self) -> str:
        """The reason followed by its sources in parentheses."""
        sources = f" ({'; '.join(each.name for each in self.references)})" if self.references else ""
        return f"{self.reason}{sources}"


def suggest(facts: SuggestionFacts, kept: Collection[Topic] = ()) -> tuple[Suggestion, ...]:
    """Return a suggestion for each topic. Each suggestion takes the earlier ones into account.

    Args:
        facts: The facts to derive suggestions from.
        kept: Topics whose settings stay as in the recipe. The other suggestions take these settings into
            account.

    Raises:
        UserError: The memory cannot be estimated: the model or its target modules are not supported.
    """
    recipe = facts.recipe
    for _ in range(_MOST_ROUNDS):
        before, suggestions = recipe, []
        if "batch" not in kept:
            recipe = _with_batch(recipe, 1, recipe.effective_batch)
        for topic, derive in _RULES.items():
            suggestion = derive(facts, recipe)
            if topic not in kept:
                recipe = replace_settings(recipe, suggestion.changes)
            suggestions.append(suggestion)
        if recipe == before:
            break
    return tuple(suggestions)


def _suggested(
    facts: SuggestionFacts, topic: Topic, path: str, value: Any, reason: str, *references: Reference
) -> Suggestion:
    """Return a suggestion of ``value`` for one setting, without changes if the recipe already has it."""
    now, label = get_setting(facts.recipe, path), fields()[path].label
    show = format_rate if topic == "rate" else format_number
    changes = {} if now == value else {path: value}
    return Suggestion(topic, label, show(now), show(value), reason, references, changes)


def _left(facts: SuggestionFacts, topic: Topic, path: str, why: str) -> Suggestion:
    """Return a suggestion that leaves one setting unchanged, with the reason ``why``."""
    return replace(
        _suggested(facts, topic, path, get_setting(facts.recipe, path), f"Unchanged: {why}"),
        is_known=False,
    )


def _length(facts: SuggestionFacts, recipe: Recipe) -> Suggestion:
    """Suggest the shortest length that truncates no sample, as far as model, memory and batch allow."""
    path, lengths = "data.max_length", facts.lengths
    count, longest = len(lengths), lengths[-1]
    needed = _multiple(longest, math.ceil)

    def fits(multiple: int) -> bool:
        return facts.fits(replace_setting(recipe, path, multiple * LENGTH_STEP))

    limits: dict[int, tuple[str, tuple[Reference, ...]]] = {needed: ("", ())}
    if context := facts.architecture.max_positions:
        limits[_multiple(context, math.floor)] = (f"the model was trained for {context:,} tokens", ())
    if recipe.data.packing and is_padding_free(recipe, facts.architecture):
        most = _multiple(_TOO_MANY_PER_STEP * sum(lengths) / count, lambda steps: math.ceil(steps) - 1)
        too_many = f"a longer packed sequence has {_TOO_MANY_PER_STEP} samples or more, too many for a step"
        limits[most] = (too_many, (WITHOUT_REGRET, TRL))
    suggested = min(limits)
    why, references = limits[suggested]
    if not fits(suggested // LENGTH_STEP):
        suggested = largest_fitting(suggested // LENGTH_STEP, fits) * LENGTH_STEP
        why, references = f"no greater length fits in {facts.memory_words}", ()
    if not suggested:
        return _left(facts, "length", path, f"no length fits in {facts.memory_words}. See Memory.")
    below = lengths[math.ceil(0.95 * count) - 1]
    what = (
        f"{pluralize(count // 2, 'pair')} with sequences"
        if recipe.trains_pairs
        else pluralize(count, "sample")
    )
    seen = f"{what} of at most {pluralize(longest, 'token')} (95% up to {below:,}; "
    seen += "counted" if facts.known.is_exact else "estimated from the text"
    seen += ")" if facts.known.is_complete else " of the part that was read)"
    if suggested >= longest:
        return _suggested(facts, "length", path, suggested, f"{seen}: {suggested:,} truncates none.")
    longer = sum(length > suggested for length in lengths)
    fate = "dropped" if recipe.data.overflow == "drop" else "split" if _splits(recipe) else "cut"
    verb = "is" if longer == 1 else "are"
    reason = (
        f"{seen}: {longer:,} {verb} longer than {suggested:,} and {verb} {fate} (Overflow), because {why}."
    )
    return _suggested(facts, "length", path, suggested, reason, *references)


def _rank(facts: SuggestionFacts, recipe: Recipe) -> Suggestion:
    """Suggest a rank whose parameters can store the information in the data."""
    path, now = "lora.rank", recipe.lora.rank
    if recipe.lora.init_from:
        return _left(facts, "rank", path, "the run continues an adapter, and must keep its rank.")
    bits = _BITS_PER_TOKEN * sum(facts.lengths)

    def parameters(rank: int) -> int:
        ranked = replace_setting(recipe, path, rank)
        execution = trainer_execution(ranked, facts.device, facts.architecture)
        return build_layout(ranked, facts.architecture, execution).adapter_parameters

    ranks = [rank for rank in RANKS if rank <= min(_HIGHEST_RANK, facts.architecture.hidden_size)]
    roomy = (rank for rank in ranks if _BITS_PER_PARAMETER * parameters(rank) >= bits)
    lowest, highest = _COMPARED_RANKS
    needed = next(roomy, max(ranks, default=now))
    suggested = min(max(now, needed, lowest), max(needed, highest))
    limit = ""
    if not facts.fits(replace_setting(recipe, path, suggested)):
        lower = [rank for rank in sorted({*ranks, now}) if rank < suggested]
        fitting = [rank for rank in lower if facts.fits(replace_setting(recipe, path, rank))]
        suggested = max(fitting, default=min(now, suggested))
        limit = f" No higher rank fits in {facts.memory_words}." if fitting else ""
    trained = parameters(suggested)
    room = _BITS_PER_PARAMETER * trained
    holds = (
        f"Rank {suggested} trains {format_count(trained)} parameters, which can store about "
        f"{format_count(room)} bits; the data has {format_count(bits)} tokens, at about a bit each."
    )
    if room < bits:
        return _suggested(facts, "rank", path, suggested, f"{holds}{limit}", WITHOUT_REGRET, CAPACITY)
    alike = f"With capacity to spare, ranks {lowest} to {highest} on all linear layers did equally well."
    reason = f"{holds} {alike}{limit}"
    return _suggested(facts, "rank", path, suggested, reason, WITHOUT_REGRET, CAPACITY, QLORA)


def _epochs(facts: SuggestionFacts, recipe: Recipe) -> Suggestion:
    """Suggest the number of epochs that was best in earlier runs, or a published one for similar data."""
    path, now = "training.epochs", recipe.training.epochs
    if limit := recipe.training.max_steps:
        return _left(facts, "epochs", path, f"Max steps ends the run after {limit:,} steps.")
    samples = _units(facts, recipe)
    alike = [run for run in facts.past if _same_method(run.recipe, recipe)]
    best = min(alike, key=lambda run: run.best_loss, default=None)
    result = (
        f"Your run {best.name} had its lowest validation loss, {format_loss(best.best_loss)}," if best else ""
    )
    if best is not None and best.best_epoch < best.last_epoch:
        then = float(max(1, math.ceil(round(best.best_epoch, 2))))
        when = (
            f"after {format_number(round(best.best_epoch, 1))} of {format_number(round(best.last_epoch, 1))}"
        )
        return _suggested(facts, "epochs", path, then, f"{result} {when} epochs.")
    if recipe.preference_method is not None:
        why = (
            f"the papers cited here do not cover {recipe.data.preferences}, and no earlier run of yours does."
        )
        return _left(facts, "epochs", path, why)
    few = samples <= _FEW_SAMPLES
    lowest, highest = _EPOCHS_OF_FEW if few else _EPOCHS
    if few:
        # Enough epochs that even with one sample per step the run is not short.
        lowest = min(highest, max(lowest, float(math.ceil(_SHORT_RUN_STEPS / samples))))
    then = min(max(now, lowest), highest)
    usual = f"{pluralize(samples, 'sample')}: "
    if few:
        usual += "between the QLoRA paper's 3 epochs on 9,209 samples and LIMA's 15 on 1,000"
    else:
        usual += f"{format_number(lowest)} to {format_number(highest)} epochs are usual"
    if few and lowest > _EPOCHS_OF_FEW[0]:
        usual += f"; fewer than {format_number(lowest)} make a short run even with 1 sample per step"
    kept = (
        "the best checkpoint is kept"
        if recipe.data.validation_path or recipe.data.validation_fraction
        else ""
    )
    references = (QLORA, LIMA) if few else (QLORA, UNSLOTH)
    if best is not None:
        at_end = (
            f"at its end, after {format_number(round(best.last_epoch, 1))} epochs, so fewer are not enough."
        )
        then = max(then, float(math.ceil(round(best.last_epoch, 2))))
        return _suggested(facts, "epochs", path, then, f"{usual}. {result} {at_end}", *references)
    return _suggested(facts, "epochs", path, then, "; ".join(filter(None, (usual, kept))) + ".", *references)


def _batch(facts: SuggestionFacts, recipe: Recipe) -> Suggestion:
    """Suggest the published number of samples per step, or fewer if the run is short, and the fastest
    micro-batch that fits.
    """
    samples, sequences = _units(facts, recipe), _sequences(facts, recipe)
    per_sequence = samples / sequences
    seen = samples * recipe.training.epochs
    least_steps = min(_SHORT_RUN_STEPS, recipe.training.max_steps or _SHORT_RUN_STEPS)
    traits = recipe.preference_traits
    least = _LEAST_RATED if traits is not None and traits.rates_answers else 1
    wanted = min(_SAMPLES_PER_STEP, max(least, seen / least_steps))
    rows = 2 ** max(0, round(math.log2(wanted / per_sequence)))
    gpus = max(1, recipe.training.gpus)
    rows = -(-rows // gpus) * gpus
    open_ = _with_batch(recipe, 1, rows, auto=True)
    choice = choose_step(open_, facts.architecture, facts.free_bytes, device=facts.device)
    micro = choice.recipe.training.micro_batch_size
    changed = _with_batch(facts.recipe, micro, rows // micro)
    paths = ("training.micro_batch_size", "training.gradient_accumulation")
    changes = {path: get_setting(changed, path) for path in paths}
    is_right = changes == {path: get_setting(facts.recipe, path) for path in paths}
    per_step = rows * per_sequence
    unit = "pair" if recipe.trains_pairs else "sample"
    step = f"{_about(per_step)} {unit}s per step" if round(per_step) != 1 else f"1 {unit} per step"
    if per_sequence > _PACKED:
        step += f" ({pluralize(rows, 'sequence')} of {format_number(round(per_sequence, 1))})"
    steps = max(1, round(seen / per_step))
    if rows == gpus and per_step > 1.5 * wanted:
        of_each = "a step has at least one sequence" if gpus == 1 else f"each of {gpus} GPUs needs a sequence"
        why = f"{step} are the minimum, because {of_each}"
        if per_sequence > _PACKED:
            why += ", packed (data.packing)"
        if per_step >= _TOO_MANY_PER_STEP:
            why += f"; {_TOO_MANY_PER_STEP} or more are worse"
    elif traits is not None and wanted == least > 1:
        why = f"{step}: {traits.label} estimates its reference point from the other answers of a step"
    elif wanted < _SAMPLES_PER_STEP:
        why = (
            f"{step} {'gives' if round(per_step) == 1 else 'give'} {pluralize(steps, 'step')}; "
            f"with the usual {_SAMPLES_PER_STEP} the run would have only "
            f"{max(1, round(seen / _SAMPLES_PER_STEP)):,}"
        )
    else:
        why = f"{step}, near the QLoRA paper's {_SAMPLES_PER_STEP}; {_TOO_MANY_PER_STEP} or more are worse"
    verdict = check_fit(choice.estimate, facts.available_bytes)
    if not verdict.fits_even_if_tight:
        memory = f"even 1 at a time {'may not fit' if verdict.word == 'uncertain' else 'does not fit'} in"
        memory = f"{memory} {facts.memory_words}: see Memory"
    elif recipe.quantization.streamed_layers:
        memory = f"{micro} at a time, as for every model that is streamed from host memory"
    elif not choice.estimate.exact:
        memory = f"{micro} at a time, because the memory of this model's step is uncertain"
    elif facts.device.kind == "cpu":
        memory = "on a CPU, more than 1 at a time is no faster"
    else:
        memory = f"{micro} at a time is the fastest that fits in {facts.memory_words}"
    return Suggestion(
        "batch",
        "Batch",
        _product(facts.recipe),
        _product(changed),
        f"{capitalize(why)}; {memory}.",
        (QLORA, WITHOUT_REGRET, TRL),
        {} if is_right else changes,
    )


def _rate(facts: SuggestionFacts, recipe: Recipe) -> Suggestion:
    """Suggest the best rate of earlier runs that differ only in their rate, or the published rate."""
    path, now = "training.learning_rate", facts.recipe.training.learning_rate
    alike = [run for run in facts.past if _same_method(run.recipe, recipe)]
    if (compared := _compared_rates(alike)) is not None:
        return _suggested(facts, "rate", path, *compared)
    own = ""
    if alike:
        best = min(alike, key=lambda run: run.best_loss)
        own = (
            f" Your run {best.name} with {format_rate(_rate_of(best))} had a validation loss of "
            f"{format_loss(best.best_loss)}: compare it with a run at another rate."
        )
    elif facts.outdated:
        own = f" {pluralize(facts.outdated, 'earlier run')} not considered: the data has changed since."
    if why := _beyond_sources(recipe):
        return _left(facts, "rate", path, f"{why}.{own}")
    size = facts.architecture.total_params
    rate = next(rate for most, rate in _RATES if size <= most)
    references = [QLORA, WITHOUT_REGRET]
    (_, of_13b), (_, of_33b) = _RATES
    text = (
        f"The model has {format_count(size)} parameters. The QLoRA paper trains 7B and 13B with "
        f"{format_rate(of_13b)}, 33B and 65B with {format_rate(of_33b)}. LoRA's best rate "
        "is about ten times that of full fine-tuning, whatever the rank."
    )
    if size < _SMALLEST_MEASURED:
        text += " The paper has no smaller models, which may need a higher rate."
    if _optimizer_kind(recipe) == "lion":
        rate = float(f"{rate * _LION_SHARE:.2g}")
        references.append(LION)
        text += f" Lion takes about a third of AdamW's: {format_rate(rate)}."
    if math.isclose(rate, now, rel_tol=_NO_OTHER_RATE):
        rate = now
    return _suggested(facts, "rate", path, rate, f"{text}{own}", *references)


def _compared_rates(alike: Collection[PastRun]) -> tuple[float, str] | None:
    """Compare runs that differ only in the learning rate. Return the best rate and the reason; None if no two
    such runs have different rates.
    """
    groups: dict[bytes, list[PastRun]] = {}
    for run in alike:
        groups.setdefault(_all_but_the_rate(run), []).append(run)
    compared = [group for group in groups.values() if len(set(map(_rate_of, group))) > 1]
    # A sweep stopped the other runs earlier, because they were worse.
    runs = max(compared, key=lambda group: group[0].last_epoch, default=[])
    if not runs:
        return None
    rates = sorted(set(map(_rate_of, runs)))
    best, *others = sorted(runs, key=lambda run: run.best_loss)
    rate = _rate_of(best)
    losses = ", ".join(
        f"{format_rate(_rate_of(run))}: {format_loss(run.best_loss)}"
        for run in others
        if _rate_of(run) != rate
    )
    reason = (
        f"Of your runs that differ only in the rate, {best.name} with {format_rate(rate)} had the lowest "
        f"validation loss, {format_loss(best.best_loss)} ({losses})."
    )
    if rate == rates[-1]:
        reason += " This is the highest rate that you tried: a higher rate may be better."
    elif rate == rates[0]:
        reason += " This is the lowest rate that you tried: a lower rate may be better."
    return rate, reason


_RULES: dict[Topic, Callable[[SuggestionFacts, Recipe], Suggestion]] = {
    "length": _length,
    "rank": _rank,
    "epochs": _epochs,
    "batch": _batch,
    "rate": _rate,
}
"""Function that derives each suggestion from the facts, and from the recipe with the earlier suggestions."""


def _multiple(tokens: float, rounded: Callable[[float], int]) -> int:
    """Round a length to a multiple of LENGTH_STEP. The result is at least LENGTH_STEP."""
    return max(1, rounded(tokens / LENGTH_STEP)) * LENGTH_STEP


def _with_batch(recipe: Recipe, micro: int, accumulation: int, *, auto: bool | None = None) -> Recipe:
    recipe = replace_setting(recipe, "training.micro_batch_size", micro)
    recipe = replace_setting(recipe, "training.gradient_accumulation", min(accumulation, 65_536))
    return recipe if auto is None else replace_setting(recipe, "training.auto_micro_batch", auto)


def _product(recipe: Recipe) -> str:
    return f"{recipe.training.micro_batch_size} × {recipe.training.gradient_accumulation}"


def _about(number: float) -> str:
    return (
        f"{round(number):,}"
        if math.isclose(number, round(number), rel_tol=0.005)
        else f"about {round(number):,}"
    )


def _fitted(facts: SuggestionFacts, recipe: Recipe) -> SampleLengths:
    """Return the lengths of the samples after those above the recipe's maximum length are truncated, dropped
    or split.
    """
    limit, lengths, sources = recipe.data.max_length, array("I"), array("H")
    whole, of_each = array("I", facts.known.lengths), array("H", facts.known.sources)
    together = 2 if recipe.trains_pairs else 1
    for first in range(0, len(whole), together):
        row = whole[first : first + together]
        if recipe.data.overflow == "drop" and max(row) > limit:
            continue
        if _splits(recipe):
            parts = [min(limit, length - start) for length in row for start in range(0, length, limit)]
        else:
            parts = [min(limit, length) for length in row]
        lengths.extend(parts)
        sources.extend([of_each[first]] * len(parts))
    return SampleLengths(lengths, sources, recipe.data)


def _splits(recipe: Recipe) -> bool:
    """Return whether samples that are too long are split. Compared or rated answers are never split."""
    return recipe.data.overflow == "split" and recipe.preference_method is None


def _units(facts: SuggestionFacts, recipe: Recipe) -> int:
    """Return the number of samples, or pairs, of an epoch. At least 1."""
    order = _fitted(facts, recipe).epoch(0, recipe.training.seed)
    return max(1, len(order) // (2 if recipe.trains_pairs else 1))


def _sequences(facts: SuggestionFacts, recipe: Recipe) -> int:
    """Return the number of sequences of an epoch, packed if recipe and model code allow it. At least 1."""
    one = replace_setting(_with_batch(recipe, 1, 1), "training.epochs", 1.0)
    padding_free = is_padding_free(recipe, facts.architecture)
    return max(1, count_steps(_fitted(facts, recipe), one, padding_free=padding_free).per_epoch)


def _optimizer_kind(recipe: Recipe) -> str:
    """Return ``adamw``, ``lion`` or ``adafactor``: how states are stored does not affect the best rate."""
    name = recipe.training.optimizer
    return next((kind for kind in ("lion", "adafactor") if kind in name), "adamw")


def _same_method(a: Recipe, b: Recipe) -> bool:
    """Return whether two recipes use methods for which the same learning rate is the best."""
    if _optimizer_kind(a) != _optimizer_kind(b):
        return False
    return all(get_setting(a, path) == get_setting(b, path) for path in _DECIDES_RATE)


def _beyond_sources(recipe: Recipe) -> str:
    """Return why the published rates do not apply to a recipe, in a clause; empty if they do."""
    lora, training = recipe.lora, recipe.training
    if recipe.preference_method is not None:
        return f"the papers cited here do not cover {recipe.data.preferences}"
    if _optimizer_kind(recipe) == "adafactor":
        return "no paper cited here has a rate for adafactor"
    if lora.use_rslora:
        return "the published rates are for alpha / rank, not rsLoRA's alpha / √rank"
    if not _ALPHAS[0] <= lora.alpha <= _ALPHAS[1]:
        alphas = " and ".join(map(format_number, _ALPHAS))
        return f"the published rates are for alpha {alphas}, not {format_number(lora.alpha)}"
    if training.lora_plus_ratio > 1:
        return "LoRA+ uses different rates for A and B, and no paper cited here has such rates"
    if lora.init_from:
        return "the run continues an adapter, for which no paper cited here has a rate"
    return ""


def _rate_of(run: PastRun) -> float:
    return run.recipe.training.learning_rate


def _all_but_the_rate(run: PastRun) -> bytes:
    """Return a key that two runs share if their losses show which of their learning rates is better."""
    recipe = _with_batch(run.recipe, 1, run.recipe.effective_batch, auto=True)
    paths = ("training.learning_rate", "training.optimizer", *WITHOUT_EFFECT_ON_WEIGHTS)
    recipe = replace_settings(recipe, {path: get_setting(Recipe(), path) for path in paths})
    return msgspec.json.encode((run.data_hash, round(run.last_epoch, 2), recipe))
