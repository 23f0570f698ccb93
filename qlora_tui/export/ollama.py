"""``export ollama``: a GGUF file with its Modelfile, and the model that ``ollama create`` makes from them.

The file contains the merged model, because Ollama 0.34 and newer reject ``ADAPTER`` in a Modelfile.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.loading import chat_tokenizer
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.export.gguf import GgufExport, export_gguf
from qlora_tui.export.gguf_file.content import base_license
from qlora_tui.export.gguf_file.vocabulary import adds_bos
from qlora_tui.export.ollama_template import OllamaTemplate, ollama_template
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing
from qlora_tui.runs.exports import COMPARED_TOKENS, ollama_file_stem
from qlora_tui.visible import visible
from qlora_tui.worker import user_env

MODELFILE = "Modelfile"
_NAME = re.compile(r"(?:(?:[\w.-]+(?::\d+)?/)?[\w-]+/)?(?P<model>[\w.-]+)(?P<tag>:[\w.-]+)?", re.ASCII)
_MAX_NAME = 80
"""Maximum length of each part of a name (``types/model/name.go`` of Ollama)."""
_MIN_CONTEXT = 4096
_SHOW_S = 30
"""Seconds to wait for Ollama to look up a name."""
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")

StatusFn = Callable[[str], None]


class OllamaExport(Struct, frozen=True, kw_only=True):
    """A model for Ollama."""

    name: str
    folder: str
    """Folder with the GGUF file and the Modelfile."""
    gguf: GgufExport
    has_template: bool
    """Whether the Modelfile has a TEMPLATE."""
    notes: tuple[str, ...] = ()
    created: bool = False
    """Whether ``ollama create`` has created the model from the folder."""

    @property
    def summary(self) -> str:
        """How the file was checked, and notes on the Modelfile, with a line for each sentence."""
        return "\n".join([self.gguf.summary, *self.notes])

    @property
    def command(self) -> str:
        """Command that runs the model, or that creates it first."""
        if self.created:
            return f"ollama run {self.name}"
        return f"cd {shlex.quote(self.folder)} && ollama create {self.name} -f {MODELFILE}"


def export_ollama(
    source: ChatSource,
    adapter_name: str,
    name: str,
    folder: Path,
    file_type: str,
    *,
    replace_model: bool = False,
    compared_tokens: int = COMPARED_TOKENS,
    on_status: StatusFn = lambda words: None,
) -> OllamaExport:
    """Write ``folder``, which must not exist yet, and create the model if Ollama is installed.

    Args:
        source: The base and its adapters.
        adapter_name: The adapter to merge.
        name: Name of the model in Ollama: ``[namespace/]model[:tag]``.
        folder: Output folder.
        file_type: A type of ``export gguf``, or ``auto``.
        replace_model: Whether to replace an existing model of this name in Ollama.
        compared_tokens: Maximum number of trained tokens at which answers are compared.
        on_status: Called with the current activity.

    Raises:
        UserError: Nothing was written, or the folder was written but the model was not created in Ollama.
    """
    check_name(name)
    refuse_existing(folder)
    if not replace_model:
        _refuse_existing_model(name)
    base = model_folder(source.recipe, on_status)
    tokenizer = chat_tokenizer(source, base)
    template = ollama_template(tokenizer, source.thinking, adds_bos=adds_bos(tokenizer))
    file = f"{ollama_file_stem(name)}.gguf"
    with draft_folder(folder) as draft:
        written = export_gguf(
            source,
            adapter_name,
            draft / file,
            [file_type],
            compared_tokens=compared_tokens,
            on_status=on_status,
        )
        keys = read_gguf(draft / file).values
        limit = int(keys[f"{keys['general.architecture']}.context_length"])
        context = context_size(source.recipe.data.max_length, limit)
        text = _modelfile(file, template, tokenizer, context, base_license(base))
        (draft / MODELFILE).write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        publish_new(draft, folder)
    files = tuple(replace(done, path=str(folder / file)) for done in written.files)
    result = OllamaExport(
        name=name,
        folder=str(folder),
        gguf=replace(written, files=files),
        has_template=bool(template.text),
        notes=_notes(template, tokenizer),
    )
    if shutil.which("ollama") is None:
        return result
    if not replace_model:
        # Another program may have created it while the file was written.
        _refuse_existing_model(name, why=f"{folder} is complete, but was not passed to Ollama.")
    _create(result, on_status)
    return replace(result, created=True)


def check_name(name: str) -> None:
    """Raise UserError if Ollama does not accept the name."""
    match = _NAME.fullmatch(name)
    parts = re.split("[/:]", name)
    is_valid = (
        match is not None
        and all(part[0] not in ".-" and len(part) <= _MAX_NAME for part in parts)
        and ".." not in name
    )
    if not is_valid:
        raise UserError(
            "Invalid name for Ollama",
            what=f"{visible(name[:_MAX_NAME])!r} is not of the form model, model:tag or namespace/model:tag.",
            why="Names consist of letters and digits, with _ - . inside.",
            fix="Choose a name such as tickets:8b.",
            exit_code=EXIT_USAGE,
        )


def context_size(max_length: int, model_limit: int | None) -> int:
    """Return the context size to allocate, in tokens: the smallest power of two that holds a training row,
    but at least ``_MIN_CONTEXT`` and at most the model's limit.
    """
    wanted = max(_MIN_CONTEXT, 1 << (max_length - 1).bit_length())
    return min(wanted, model_limit or wanted)


def _modelfile(
    file: str, template: OllamaTemplate, tokenizer: ChatTokenizer, context: int, license_id: str
) -> str:
    lines = [f"FROM ./{file}"]
    if template.text:
        lines.append(f'TEMPLATE """{template.text}"""')
    lines.append(f"PARAMETER num_ctx {context}")
    ends = dict.fromkeys(tokenizer.backend.id_to_token(number) for number in tokenizer.turn_end_ids)
    lines += [f'PARAMETER stop "{end}"' for end in ends if end and '"' not in end]
    if license_id:
        lines.append(f'LICENSE "{license_id}"')
    return "\n".join(lines) + "\n"


def _notes(template: OllamaTemplate, tokenizer: ChatTokenizer) -> tuple[str, ...]:
    if not template.text:
        return (
            f"The Modelfile has no TEMPLATE: {template.reason}. Ollama then guesses one, and may answer "
            "differently; llama-server uses the model's own template.",
        )
    notes = [template.note] if template.note else []
    if tokenizer.traits.tools:
        notes.append(
            "The TEMPLATE does not support tools; llama-server uses the model's own template, which does."
        )
    return tuple(notes)


def _refuse_existing_model(name: str, why: str = "`ollama create` replaces it without asking.") -> None:
    """Raise UserError if Ollama has a model with this name. Checked only if Ollama is installed and runs."""
    if shutil.which("ollama") is None:
        return
    command = ["ollama", "show", name]
    try:
        shown = subprocess.run(
            command, env=user_env(), stdin=subprocess.DEVNULL, capture_output=True, timeout=_SHOW_S
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "Ollama does not answer",
            what=f"`ollama show {name}` did not finish within {_SHOW_S} seconds.",
            why=f"Ollama may already have a model named {name}, which this export would replace.",
            fix="Check whether Ollama is running. To replace an existing model, add --replace.",
        ) from error
    except OSError:
        # In this case, Ollama cannot create a model either, and reports it.
        return
    if shown.returncode == 0:
        raise UserError(
            "The model name is already in use",
            what=f"Ollama already has a model named {name}.",
            why=why,
            fix="Choose another name, or replace it with: qlora-tui export ollama … --replace",
            exit_code=EXIT_USAGE,
        )


def _create(result: OllamaExport, on_status: StatusFn) -> None:
    """Run ``ollama create``. Raises UserError with its last messages; the folder is kept."""
    command = ["ollama", "create", result.name, "-f", MODELFILE]
    on_status(f"Running {' '.join(command)}")
    last = "it wrote nothing"
    try:
        with subprocess.Popen(
            command,
            cwd=result.folder,
            env=user_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            try:
                for line in _status_lines(process.stdout):
                    last = line
                    on_status(f"ollama: {line}")
            except BaseException:
                # A cancel must not wait for the process.
                process.kill()
                raise
        if process.returncode == 0:
            return
    except OSError as error:
        last = error.strerror or str(error)
    raise UserError(
        "Ollama did not create the model",
        what=f"`ollama create` failed: {last.rstrip('.')}.",
        why=f"{result.folder} is complete; only this last step is missing.",
        fix=f"Start Ollama with `ollama serve` if it is not running, then: {result.command}",
    )


def _status_lines(output: IO[bytes]) -> Iterator[str]:
    """Yield each line once, without terminal codes, because Ollama repeats lines to animate them."""
    before = ""
    for block in output:
        for part in _ANSI.sub("", block.decode(errors="replace")).replace("\n", "\r").split("\r"):
            # Animated parts are braille characters or percentages.
            line = visible(re.sub(r"[\u2800-\u28ff▕█▏ ]+|\b\d+% .*$", " ", part).strip())
            if line and line != before:
                before = line
                yield line
