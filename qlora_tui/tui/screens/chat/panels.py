"""Panels around a conversation: the adapters that answer and their settings, the adapter's effect, the
starter prompts with the prompt field, and the side column.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from textual import work
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.css.query import NoMatches
from textual.widget import Widget

from qlora_tui.chat.chat_sources import adapter_label, checkpoint_step
from qlora_tui.chat.chat_types import Effect, GenerationResult, Sampling
from qlora_tui.engine.protocol import ChatReady
from qlora_tui.formatting import (
    format_bytes,
    format_nats,
    format_number,
    format_path,
    format_small_percent,
    format_speed,
    pluralize,
    short_model_name,
    truncate_middle,
)
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.chat_choices import ENOUGH, ChoiceKind
from qlora_tui.runs.servers import ServerStatus
from qlora_tui.tui import clock
from qlora_tui.tui.breakpoints import AIRY_CELLS
from qlora_tui.tui.key_names import (
    TITLE_GAP,
    bare_key,
    command_key,
    highlight_keys,
    key_hint,
    key_label,
    key_name,
    name_keys,
)
from qlora_tui.tui.render.columns import fact_lines
from qlora_tui.tui.render.meters import blocks, downsample, labeled, meter
from qlora_tui.tui.screens.chat.conversation import AdapterPair, Conversation
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.saved import (
    SavedConversation,
    conversation_line,
    list_conversations,
    prompt_line,
)
from qlora_tui.tui.screens.chat.start import (
    HEADING_ROWS,
    ChatStart,
    Starters,
    offered_prompts,
    run_lines,
    start_lines,
    weights_of,
)
from qlora_tui.tui.screens.chat.turn import GROWTH_ROWS, adapter_style
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, Write

NOTHING_TO_CHAT_WITH = (
    "Nothing to chat with yet.\n\nA run becomes available once it has saved a checkpoint. "
    "Press {go.train} to launch a run.\n\nOr press {chat.source} to chat with the recipe's model as it is, "
    "before any training."
)
TIPS = (
    (
        "compare",
        "{chat.next_adapter} selects another checkpoint, and {chat.left_adapter} one for the left side.",
    ),
    ("measure", "{chat.effect} measures how much the adapter changes the base model."),
    (
        "judge",
        "{chat.prefer_left} or {chat.prefer_right} marks the better answer, and {chat.edit_answer} edits it. "
        "{chat.train_choices} trains on what you marked.",
    ),
    ("reuse", "{chat.copy} copies the last answer, and {chat.serve} serves the model to other programs."),
)
"""(label, sentence) pairs about what the user can do with answers. A placeholder, such as ``{chat.effect}``,
stands for the key of a command.
"""
_MIN_NAME_WIDTH = 16
_MIN_COLUMNS = 8
"""Minimum number of columns of the layer chart, even in a narrow window."""
_LABEL = 12
_CHARACTERS_PER_TOKEN = 4
"""Approximate number of characters per token in English text."""
_LEAST_SHARE = 0.03
"""An answer that uses less than this fraction of the context has no bar."""
_KINDS: dict[ChoiceKind, str] = {"pairs": "choices", "edits": "edits"}


def session_line(name: str, pair: AdapterPair, start: ChatStart, state: str, width: int) -> Content:
    """Return a line with the name of the run or model, the selected adapters, and the state. ``●`` precedes
    an adapter that answers, and ``○`` one that does not.

    If the line is too long, the middle of the name is left out.
    """
    parts: list[Content | str | tuple[str, str]] = []
    for adapter_name in dict.fromkeys((pair.left, pair.right)):
        is_on = adapter_name in pair.active
        style = adapter_style(adapter_name) if is_on else "not bold $text-muted"
        label = weights_of(start, adapter_name) if checkpoint_step(adapter_name) is not None else ""
        parts.append((f"  {'●' if is_on else '○'} {label or adapter_label(adapter_name)}", style))
    rest = Content.assemble(*parts, (f"  {state}", "not bold $text-muted"))
    name = truncate_middle(name, max(_MIN_NAME_WIDTH, width - rest.cell_length))
    return Content.styled(name, "bold") + rest


def loaded_text(ready: ChatReady, *, is_brief: bool) -> str:
    """Return the device, dtype, memory and context of a loaded model, such as ``RTX 4090 bfloat16, 5.2 GiB,
    context 32,768``. If ``is_brief``, return only the memory: ``loaded, 5.2 GiB``.
    """
    if is_brief:
        return f"loaded, {format_bytes(ready.memory_bytes)}"
    return (
        f"{ready.device} {ready.dtype}, {format_bytes(ready.memory_bytes)}, context {ready.context_tokens:,}"
    )


def unloaded_text(chat: Conversation, server: ServerStatus | None) -> str:
    """Return the note to show while the chat has no model in memory. If a server holds a model, the note says
    so; otherwise, it says why the chat's model was unloaded. If neither applies, the note is empty.

    Args:
        server: A server that holds a model in memory; None if no server does.
    """
    if server is not None and not chat.ready:
        return (
            f"■ The server on port {server.port} holds its own copy of {short_model_name(server.base)} "
            f"({format_bytes(server.memory_bytes)}). {key_name('chat.serve')} stops it."
        )
    because = chat.unloaded_because
    return f"■ Unloaded: {because}. The next message loads the model again." if because else ""


def thinking_text(setting: Thinking, ready: ChatReady | None) -> str:
    """Return the thinking mode, such as ``thinking on``; empty if the model cannot think, or if no model is
    loaded and the mode is ``auto``.
    """
    if ready is None:
        return "" if setting == "auto" else f"thinking {setting}"
    known = ready.thinking
    match known.kind:
        case "none":
            return ""
        case "always":
            return "always thinks"
        case "effort":
            return f"{known.variable} {known.off}" if setting == "off" else "thinks"
        case "switch":
            return f"thinking {known.default if setting == 'auto' else setting}"


def session_rows(chat: Conversation) -> list[tuple[str, str, str]]:
    """Return (label, value, short value) rows for thinking, the judgments and the sampling settings. For most
    settings, the short value is empty if the setting has its default value.
    """
    sampling, greedy = chat.sampling, not chat.sampling.temperature
    thinks = thinking_text(chat.thinking, chat.ready)
    system_prompt = " ".join(chat.system_prompt.split())
    rows = [("thinking", thinks, thinks)] if thinks else []
    for kind, count in chat.choice_counts.items():
        if count:
            rows.append((_KINDS[kind], f"{count} of {ENOUGH}", f"{count} of {ENOUGH} {_KINDS[kind]}"))
    if greedy:
        rows.append(("temperature", "0, greedy", "greedy"))
    else:
        temperature, top_p = format_number(sampling.temperature), format_number(sampling.top_p)
        top_k = f"{sampling.top_k}" if sampling.top_k else ""
        rows += [
            ("temperature", temperature, f"temp {temperature}"),
            ("top-p", top_p, f"top-p {top_p}" if sampling.top_p < 1 else ""),
            ("top-k", top_k or "all", f"top-k {top_k}" if top_k else ""),
        ]
    penalty = "" if sampling.repetition_penalty == 1 else format_number(sampling.repetition_penalty)
    seed = "" if sampling.seed is None else str(sampling.seed)
    return [
        *rows,
        ("penalty", penalty or "none", f"penalty {penalty}" if penalty and not greedy else ""),
        ("max tokens", f"{sampling.max_new_tokens:,}", f"≤ {sampling.max_new_tokens} tokens"),
        ("seed", seed or "random", f"seed {seed}" if seed else ""),
        ("system", system_prompt or "none", f"system: {system_prompt}" if system_prompt else ""),
    ]


def has_default_settings(chat: Conversation) -> bool:
    """Return whether all settings of the conversation have their defaults, and no answer was judged."""
    is_changed = chat.thinking != "auto" or chat.sampling != Sampling()
    return not is_changed and not chat.system_prompt and not any(chat.choice_counts.values())


def sampling_line(chat: Conversation, transcript: Path | None, width: int) -> Content:
    """Return a line with the short values of :func:`session_rows` and the path of the transcript. If nothing
    was saved (``transcript`` is None), the path is replaced by the key that changes the settings.
    """
    parts = [brief for _, _, brief in session_rows(chat) if brief]
    line = " · ".join(parts)
    if transcript is None:
        key = Content.assemble("   ", key_label("chat.settings"), " change")
        return Content(line) + key if len(line) + key.cell_length <= width else Content(line[:width])
    place = f"saved in {format_path(transcript)}"
    space_left = width - len(line)
    if len(place) + 2 > space_left:
        place = f"saved in …/{transcript.parent.name}/{transcript.name}"
    if len(place) + 2 > space_left:
        line = line[: max(0, width - len(place) - 3)] + "…"
        space_left = width - len(line)
    return Content(line + " " * (space_left - len(place)) + place)


def effect_text(measured: Effect, width: int) -> Content:
    """Return the verdict on the adapter's effect and, below it, a line with the mean KL divergence and a
    chart. The chart shows the relative change of each layer, scaled to the largest change.
    """
    figures = f"KL {format_nats(measured.mean_kl)} nats"
    if measured.layers:
        first, last = measured.layers[0].layer, measured.layers[-1].layer
        most = max(measured.layers, key=lambda change: change.relative)
        before = f"{figures} · layer changes: {first} "
        after = f" {last}, most {format_small_percent(most.relative)} in {most.layer}"
        width_left = min(len(measured.layers), max(_MIN_COLUMNS, width - len(before + after)))
        columns = downsample([change.relative for change in measured.layers], width_left)
        figures = before + blocks(columns, 0.0, most.relative, 1)[0] + after
    warning = f"\n{measured.warning}" if measured.warning else ""
    return Content.assemble(measured.sentence, (warning, "$text-warning"), (f"\n{figures}", "$text-muted"))


class ChatMain(Vertical):
    """The column with the conversation and, below it, the prompt field with the starter prompts."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(id="chat-main")
        self.conversation = conversation
        self._start = ChatStart()
        self._free_rows = 0
        """Number of rows that are free for starter prompts, below their heading."""

    def compose(self) -> Iterable[Widget]:
        with Panel("Chat", id="chat-panel"):
            yield Lines(id="sampling-line")
            yield Lines(id="effect")
            yield self.conversation
            yield Starters()
            yield Lines(id="unloaded")
        label = Lines(highlight_keys(name_keys("{chat.write} ")), id="prompt-label")
        line = Horizontal(label, PromptBox(id="prompt"), id="prompt-line")
        yield Panel("Message", line, id="prompt-panel")

    def on_mount(self) -> None:
        self.watch(self.conversation, "virtual_size", self._fit_later, init=False)

    def on_chat_turn_resized(self) -> None:
        """Recompute the heights. The virtual size is at least the height of the conversation, so it does not
        change if a turn grows into free rows or shrinks.
        """
        self._fit_later()

    def show_start(self, start: ChatStart, *, is_described: bool, hides_facts: bool) -> None:
        """Show the starter prompts and, above the turns, facts about the model and the recorded answers.

        Args:
            start: The prompts and answers.
            is_described: Whether another panel describes the run.
            hides_facts: Whether to leave out the facts and answers, as during a search.
        """
        self._start = start
        chat, drawing = self.conversation, self.query_one("#chat-start", Drawing)
        self._offer()
        drawing.display = chat.source is not None and not hides_facts
        if chat.source is not None:
            draw = partial(
                start_lines,
                start,
                chat.source.recipe,
                self.query_one(Starters).selected_prompt if chat.is_new else "",
                adapter_name=chat.pair.right,
                is_loaded=chat.ready is not None,
                is_described=is_described,
                folds=not chat.is_new,
            )
            drawing.show(draw)
        self._fit_later()

    def _fit_later(self) -> None:
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        """Divide the rows between the conversation, which is as tall as its contents if they fit, and the
        starter prompts below it. While an answer is being generated, the conversation may be
        :data:`GROWTH_ROWS` taller than its contents, so that no scroll bar appears before the next layout.
        """
        try:
            drawing, panel = self.query_one("#chat-start", Drawing), self.query_one("#chat-panel")
            starters = self.query_one(Starters)
        except NoMatches:  # the screen is being closed
            return
        chat = self.conversation
        if chat.is_new and not drawing.size:
            chat.styles.max_height = None
            return
        others = [each for each in panel.children if each.display and each not in (chat, starters)]
        around = sum(each.outer_size.height + each.styles.margin.height for each in others)
        around += chat.styles.margin.height + starters.gutter.height
        rows = panel.content_size.height - around
        if chat.is_new:
            needed = drawing.get_content_height(self.size, self.size, drawing.size.width)
            needed += drawing.gutter.height
        elif chat.virtual_size.height > chat.size.height:
            needed = chat.virtual_size.height
        else:
            # Textual knows the regions only of turns in view. A virtual size is at least the size.
            regions = [each.virtual_region_with_margin for each in chat.children if each.display]
            needed = max((each.bottom for each in regions), default=0)
        self._free_rows = rows - needed - HEADING_ROWS
        self._offer()
        chat.styles.max_height = needed + (GROWTH_ROWS if chat.busy else 0)

    def _offer(self) -> None:
        chat, starters = self.conversation, self.query_one(Starters)
        asked = {turn.prompt for turn in chat.turns}
        is_tall = self.screen.size.height >= AIRY_CELLS
        # The list does not change its length while an answer grows above it.
        rows = 0 if chat.busy else self._free_rows
        offered = offered_prompts(self._start, asked, rows, is_tall=is_tall)
        if starters.has_focus and not offered:
            # Otherwise, Textual would focus the field, and keys of commands would be typed into it.
            self.screen.set_focus(None)
        starters.display = chat.source is not None and bool(offered)
        starters.offer(offered, has_heading=chat.is_new or rows >= len(offered))


class ChatSide(Vertical):
    """The column next to the conversation: run, sampling settings, tokens, saved conversations, and tips."""

    def __init__(self) -> None:
        super().__init__(id="chat-side")

    def compose(self) -> Iterable[Widget]:
        yield Panel("Run", Lines(id="side-run"), keys=(("chat.source", "model"),), id="chat-run-panel")
        yield Panel("Sampling", Lines(id="side-settings"), keys=(("chat.settings", "change"),))
        yield Panel("Tokens", Lines(id="side-tokens"), id="tokens-panel")
        keys = (("chat.history", "open"), ("chat.clear", "new"))
        yield Panel("Conversations", Lines(id="side-history"), keys=keys, id="history-panel")
        yield Panel("What to try", Lines(id="side-tips"), id="tips-panel")

    def show(self, chat: Conversation, start: ChatStart, transcript: Path | None) -> None:
        """Show a conversation and its run.

        Args:
            chat: The conversation.
            start: Facts about the run.
            transcript: Path of the conversation's transcript; None if nothing was saved.
        """
        if chat.source is not None:
            self.query_one("#chat-run-panel", Panel).show_title("Run" if chat.run_dir else "Recipe")
            self._update("run", partial(run_lines, start, chat.source.recipe, chat.pair.right))
        settings = [(label, value) for label, value, _ in session_rows(chat)]
        self._update("settings", partial(fact_lines, settings))
        tips = [(label, highlight_keys(name_keys(text))) for label, text in TIPS]
        self._update("tips", partial(fact_lines, tips))
        outcomes = {
            name: answer.outcome
            for turn in chat.turns
            for name, answer in turn.answers.items()
            if answer.outcome is not None
        }
        self.query_one("#tokens-panel").display = chat.ready is not None
        if chat.ready is not None:
            self._update("tokens", partial(token_lines, outcomes, chat.ready))
        self._show_history(chat, transcript)

    @work(group="history", exclusive=True)
    async def _show_history(self, chat: Conversation, transcript: Path | None) -> None:
        saved = await asyncio.to_thread(list_conversations, chat.run_dir)
        others = [conversation for path, conversation in saved if path != chat.path]
        self.query_one("#history-panel").display = bool(others or chat.turns or transcript)
        self._update("history", partial(history_lines, others, chat, transcript, clock.now()))

    def _update(self, part: str, write: Write) -> None:
        self.query_one(f"#side-{part}", Lines).show(write)


def token_lines(outcomes: Mapping[str, GenerationResult], ready: ChatReady, width: int) -> list[Content]:
    """Return lines about the loaded model and about each adapter's last answer: how much of the context the
    answer used, and its speed. ``outcomes``: the result of the last answer, by adapter.
    """
    lines = [
        labeled("model", f"{ready.dtype}, {format_bytes(ready.memory_bytes)}", _LABEL),
        labeled("context", f"{ready.context_tokens:,} tokens", _LABEL),
    ]
    for name, outcome in outcomes.items():
        used = outcome.prompt_tokens + outcome.new_tokens
        label = truncate_middle(adapter_label(name), _LABEL - 1)
        share = used / ready.context_tokens
        if share < _LEAST_SHARE:
            lines.append(labeled(label, f"{used:,} tokens", _LABEL))
        else:
            lines.append(meter(label, share, f"{used:,}", _LABEL, width))
        speed = f", {format_speed(outcome.tokens_per_s)} tok/s" if outcome.tokens_per_s else ""
        answer = f"{outcome.prompt_tokens:,} read, {outcome.new_tokens:,} written{speed}"
        lines.append(Content.styled(f"  {answer}", "dim"))
    return lines


def history_lines(
    others: Sequence[SavedConversation],
    chat: Conversation,
    transcript: Path | None,
    now: float,
    width: int,
) -> list[Content]:
    """Return lines with the transcript's path (if there is a transcript), the conversation in progress (if it
    has turns), and the other saved conversations. ``now``: the current Unix time.
    """
    lines = [conversation_line(saved, now, width) for saved in others]
    if chat.turns:
        lines.insert(0, prompt_line("now", chat.turns[0].prompt, len(chat.turns), width))
    if transcript is not None:
        lines.insert(0, Content.styled(truncate_middle(format_path(transcript), width), "dim"))
    return lines


def prompt_title(text: str, tokens: int | None, *, is_typing: bool, is_suggested: bool) -> Content:
    """Return the title of the prompt field: the length of its text, if it has any, and the keys that work:
    ``Message · 12 tokens · Enter sends  ^J starts a new line``.

    Args:
        text: The text in the field.
        tokens: Number of tokens, counted by the tokenizer; None to estimate it.
        is_typing: Whether the field has the focus.
        is_suggested: Whether a suggested message has the focus or, if ``is_typing``, would get it when the
            user leaves the field.
    """
    title = Content("Message")
    if text:
        estimate = max(1, round(len(text) / _CHARACTERS_PER_TOKEN))
        number = f"about {pluralize(estimate, 'token')}" if tokens is None else pluralize(tokens, "token")
        title += Content.styled(f" · {number}", "not bold $text-muted")
    enter = "sends" if is_typing else "asks the selected message"
    hints = [key_hint("Enter", enter, "enter")] if is_typing or is_suggested else []
    if is_typing:
        hints.append(key_hint("^J", "starts a new line", "ctrl+j"))
        if is_suggested:
            hints.append(key_hint(bare_key("chat.leave"), "selects a suggestion", command_key("chat.leave")))
    return TITLE_GAP.join([title, Content("  ").join(hints)] if hints else [title])
