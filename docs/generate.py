"""Writes the pages that follow from declarations: ``make docs``.

``docs/reference/`` holds recipes, settings and presets (from the schema and ``presets/``), the types of
models (from ``models.json``, which ``make check-models`` writes), the command line (from its parsers) and the
keys of each screen (from their commands); ``docs/glossary.md`` is the app's glossary, and
``docs/qlora-tui.1`` the manual page. A test fails where one of them is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.model_types.outcome import VERDICTS, Outcome, Walked
from qlora_tui import __version__
from qlora_tui.cli.command_tree import arguments_of, command_tree, subparsers
from qlora_tui.cli.main import command_parser
from qlora_tui.formatting import capitalize
from qlora_tui.glossary import GLOSSARY
from qlora_tui.recipe.fields import Field, fields, fields_of, source_fields
from qlora_tui.settings import KEYS_IN_FILE, Settings

HERE = Path(__file__).parent
_NOTICE = "<!-- Written by `make docs`. Do not edit. -->\n"
_TOPICS = {
    "model": "Which model is trained, and how its conversations are written.",
    "quantization": "How the frozen weights are stored.",
    "lora": "Which modules get an adapter, and of what size.",
    "data": "What is read, and what the model learns from it.",
    "training": "Batches, learning rate, optimizer, evaluation and checkpoints.",
}
"""A sentence for each section of a recipe."""
_RECIPE_INTRODUCTION = """\
A recipe is every decision of a run, as TOML. Each setting has a default, so a recipe names only what differs.
Settings are taken from, in this order: defaults, preset, recipe file, `--set section.key=value`. Unknown keys
and values out of bounds are errors that name file, line, key and the nearest match.
`qlora-tui presets reference` prints this page as a TOML file to start from."""
_SETTINGS_INTRODUCTION = """\
The settings of this machine, as opposed to those of a recipe, are in `config.toml` of the folder that
`qlora-tui locate` prints. F6 in the app changes them. Those about when runs train take effect within seconds,
also for a run in training."""
_PRESETS_INTRODUCTION = """\
A preset is part of a recipe. Use one with `--preset NAME` or with `p` in the app. Your own are TOML files in
the `presets` folder that `qlora-tui locate` prints; a file there hides the shipped preset of its name."""
_CLI_INTRODUCTION = """\
`qlora-tui` without a command opens the app. Every command takes `--json`, which prints one JSON object
per line on stdout, and messages on stderr. Exit codes: 0 done, 1 failed, 2 wrong call, 130 interrupted."""
_KEYS_INTRODUCTION = """\
F1 shows this list in the app. A `[keymap]` in `config.toml` gives a command another key, by its name:
`"train.stop" = "x"`. Keys are written `ctrl+x`, `escape`, `enter`, `slash`, `f2`; several as `"x,f2"`."""


def main() -> int:
    """Write every page that changed."""
    for name, text in pages().items():
        path = HERE / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"docs/{name}")
    return 0


def pages() -> dict[str, str]:
    """Every generated page by its path in ``docs/``."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/settings.md": settings_page(),
        "reference/presets.md": presets_page(),
        "reference/cli.md": cli_page(),
        "reference/keys.md": keys_page(),
        "reference/models.md": models_page(),
        "glossary.md": glossary_page(),
        "qlora-tui.1": manual_page(),
    }


# Types of models

_MODELS_INTRODUCTION = """\
Every `model_type` for which transformers {version} builds a causal language model, and every one that
reads images and text. Of each, `make check-models` trains a tiny random model on text and compares it
with transformers and peft: loss and gradients of each step, a run resumed from a checkpoint, the answers
of a chat to two questions, and the merged model. The models have the default structure of their class, with
small sizes. Of a type that reads images too, the language model is trained; images in the data are refused.

*Fast* means that all faster parts agreed with the libraries; *stock* names those of the libraries that
are used instead, and *padded* that samples are not packed, because its layers do not keep them apart.
*Chat without a cache*: each token is computed from the whole conversation, because the class has no cache
that gives the same logits. Losses and gradient norms of each step differ by less than 1e-4; of a few types
by more, but no more than rounded weights change the libraries' own. Where transformers answers otherwise
with its cache than without, either answer is right."""
_ESTIMATES_INTRODUCTION = """\
Of each trained type it also traces a step in NF4 as on a GPU, with and without checkpointing, on a model with
wider heads, and compares its tensors with the instant estimate: {within} of {count} take no more than its
range has. {widest} times the instant figure is the most ({largest}, whose range says up to {share})."""


def models_page() -> str:
    """What came of each type of model in the last walk of ``bench.model_types``, from ``models.json``."""
    outcome = msgspec.json.decode((HERE / "reference/models.json").read_bytes(), type=Outcome)
    groups = {verdict: [w for w in outcome.types if w.verdict == verdict] for verdict in VERDICTS}
    lines = [
        _NOTICE,
        "# Model types",
        "",
        _MODELS_INTRODUCTION.format(version=outcome.transformers),
        "",
        ", ".join(f"{len(group)} {verdict}" for verdict, group in groups.items() if group) + ".",
    ]
    for verdict, group in groups.items():
        if group:
            column = "computed by" if verdict == "trained" else "because"
            rows = [
                f"| `{each.model_type}` | {each.model_class} | {each.how.replace('|', ' ')} |"
                for each in group
            ]
            lines += [
                "",
                f"## {capitalize(verdict)}",
                "",
                f"| type | class | {column} |",
                "| --- | --- | --- |",
            ]
            lines += rows
    return "\n".join([*lines, *_estimates(groups["trained"])]) + "\n"


def _estimates(trained: Sequence[Walked]) -> list[str]:
    """How the memory estimates of the types that train compare with traces, and of which there is none."""
    compared = {each.model_type: each.estimate for each in trained if each.estimate}
    traced = {name: each for name, each in compared.items() if not each.untraced}
    if not traced:
        return []
    largest = max(traced, key=lambda name: traced[name].ratio)
    introduction = _ESTIMATES_INTRODUCTION.format(
        within=sum(not each.is_outside for each in traced.values()),
        count=len(traced),
        widest=f"{traced[largest].ratio:.2f}",
        largest=f"`{largest}`",
        share=f"{1 + traced[largest].uncertainty:.2f}",
    )
    lines = ["", "## Memory estimates", "", introduction]
    untraced = {name: each.untraced for name, each in compared.items() if each.untraced}
    if untraced:
        lines += [
            "",
            "No step is traced of these, whose range stays wide:",
            "",
            "| type | because |",
            "| --- | --- |",
        ]
        lines += [f"| `{name}` | {reason.replace('|', ' ')} |" for name, reason in untraced.items()]
    return lines


# Recipes and presets


def recipe_page() -> str:
    """Every setting of a recipe: type and bounds, default, what it does, and what it costs in memory."""
    lines = [
        _NOTICE,
        "# Recipe reference",
        "",
        _RECIPE_INTRODUCTION,
    ]
    section = None
    for field in fields().values():
        if field.section != section:
            section = field.section
            lines += ["", f"## `[{section}]`" if section else "## Top level"]
            lines += ["", _TOPICS[section]] if section in _TOPICS else []
        lines += _setting(field, f"`{field.key}`")
    lines += ["", "## `[[data.sources]]`", "", "One table for each data file, folder or Hub dataset."]
    for field in source_fields().values():
        lines += _setting(field, f"`{field.key}`")
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Every setting of this machine, in ``config.toml``."""
    lines = [_NOTICE, "# Settings reference", "", _SETTINGS_INTRODUCTION]
    for path, field in fields_of(Settings).items():
        lines += _setting(field, f"`{KEYS_IN_FILE.get(path, path)}`")
    return "\n".join(lines) + "\n"


def _setting(field: Field, heading: str) -> Iterator[str]:
    yield from ("", f"### {heading}", "")
    if field.help:
        yield from (field.help, "")
    yield f"* Value: {field.expected}"
    yield f"* Default: {'none, it must be given' if field.required else f'`{_toml(field.default)}`'}"
    if field.memory:
        yield f"* Memory: {field.memory}"


def _toml(value: Any) -> str:
    """A default as a recipe would have it."""
    return msgspec.json.encode(value).decode().replace(",", ", ")


def presets_page() -> str:
    """Every shipped preset, as its file has it."""
    lines = [
        _NOTICE,
        "# Presets",
        "",
        _PRESETS_INTRODUCTION,
    ]
    for path in sorted((HERE.parent / "presets").glob("*.toml")):
        lines += ["", f"## `{path.stem}`", "", "```toml", path.read_text().strip(), "```"]
    return "\n".join(lines) + "\n"


# The command line


def metavar_of(action: argparse.Action) -> str:
    """What stands for the value of an argument: ``RUN``, ``stop|pause``, or nothing for a flag."""
    if action.nargs == 0:
        return ""
    if action.metavar:
        return str(action.metavar)
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    return action.dest.upper()


def spelled(action: argparse.Action) -> str:
    """How an argument is written: ``--set KEY=VALUE``, ``RUN``."""
    if action.option_strings:
        return " ".join(filter(None, [", ".join(action.option_strings), metavar_of(action)]))
    name = metavar_of(action)
    return f"{name}…" if action.nargs in ("*", "+") else name


def usage_of(parser: argparse.ArgumentParser, words: str) -> str:
    """One line; the same in every version of Python, as argparse's own is not."""
    parts = [words]
    arguments = arguments_of(parser)
    if any(action.option_strings for action in arguments):
        parts.append("[options]")
    for action in arguments:
        if not action.option_strings:
            parts.append(f"[{spelled(action)}]" if action.nargs in ("?", "*") else spelled(action))
    if commands := subparsers(parser):
        parts.append(f"[{'|'.join(commands)}]")
    return " ".join(parts)


def _sentence(text: str) -> str:
    return capitalize(text) + ("" if text.endswith(".") else ".") if text else ""


def cli_page() -> str:
    """Every command, with its arguments."""
    top = command_parser(None)
    lines = [
        _NOTICE,
        "# Command line reference",
        "",
        _CLI_INTRODUCTION,
        "",
        *_arguments(top),
    ]
    for words, description, parser in command_tree():
        level = "##" if " " not in words else "###"
        lines += ["", f"{level} {words}", "", _sentence(description), ""]
        lines += ["```", usage_of(parser, f"qlora-tui {words}"), "```"]
        if arguments := list(_arguments(parser)):
            lines += ["", *arguments]
    return "\n".join(lines) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    if arguments := arguments_of(parser):
        yield from ("| argument | meaning |", "| --- | --- |")
    for action in arguments:
        yield f"| `{_cell(spelled(action))}` | {_cell(_explained(action))} |"


def _explained(action: argparse.Action) -> str:
    return "" if action.help is None else action.help % {"default": action.default, "prog": "qlora-tui"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# The keys


def keys_page() -> str:
    """Every command of every screen, with its key and the name a keymap calls it by."""
    from qlora_tui.tui.commands import commands_by_screen

    lines = [
        _NOTICE,
        "# Keys",
        "",
        _KEYS_INTRODUCTION,
    ]
    for heading, commands in commands_by_screen():
        lines += ["", f"## {heading}", "", "| key | command | what it does |", "| --- | --- | --- |"]
        for command in commands:
            keys = " ".join(f"`{key}`" for key in command.key.split(","))
            lines.append(f"| {keys} | `{command.id}` | {_cell(command.help)} |")
    lines += ["", "## Keys by letter", "", "What each letter does, by screen.", ""]
    letters: dict[str, list[str]] = {}
    for heading, commands in commands_by_screen():
        for command in commands:
            for key in command.key.split(","):
                if len(key) == 1 and key.isalpha():
                    letters.setdefault(key, []).append(f"{heading}: {command.label}")
    lines += ["| key | commands |", "| --- | --- |"]
    for letter in sorted(letters, key=lambda letter: (letter.lower(), letter.isupper())):
        lines.append(f"| `{letter}` | {', '.join(letters[letter])} |")
    return "\n".join(lines) + "\n"


# The glossary


def glossary_page() -> str:
    """Every word of the app's glossary, in the order of the module."""
    rows = [f"| {term} | {_cell(meaning)} |" for term, meaning in GLOSSARY.items()]
    return "\n".join([_NOTICE, "# Glossary", "", "| term | meaning |", "| --- | --- |", *rows]) + "\n"


# The manual page


def manual_page() -> str:
    """``qlora-tui.1`` in the macros of man(7)."""
    lines = [
        f'.TH QLORA\\-TUI 1 "" "qlora\\-tui {__version__}" "User Commands"',
        ".SH NAME",
        "qlora\\-tui \\- fine\\-tune language models with QLoRA on one GPU",
        ".SH SYNOPSIS",
        ".B qlora\\-tui",
        "[options] [command]",
        ".SH DESCRIPTION",
        "Without a command, the app opens. A run is a background process and a folder of files: it does",
        "not end with the terminal that started it.",
        ".SH OPTIONS",
        *_roff_arguments(command_parser(None)),
        ".SH COMMANDS",
    ]
    for words, description, parser in command_tree():
        lines += [
            f".SS {_roff(usage_of(parser, words))}",
            _roff(_sentence(description)),
            *_roff_arguments(parser),
        ]
    lines += [
        ".SH EXIT STATUS",
        "0 done, 1 failed, 2 wrong call, 130 interrupted.",
        ".SH FILES",
        ".B qlora\\-tui locate",
        "prints where presets, themes, runs and caches are. XDG_CONFIG_HOME, XDG_STATE_HOME and",
        "XDG_CACHE_HOME move them.",
    ]
    return "\n".join(lines) + "\n"


def _roff_arguments(parser: argparse.ArgumentParser) -> Iterable[str]:
    for action in arguments_of(parser):
        yield from (".TP", f".B {_roff(spelled(action))}", _roff(_explained(action)))


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "").replace("…", "...")
    # A line that starts with one of these would be a macro.
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    sys.exit(main())
