"""``export``: a run's adapter or model, or a recipe, in a form that other programs use."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from qlora_tui.catalog.gguf_file_types import (
    DEFAULT_TYPE,
    FILE_TYPES,
    needs_llama_cpp,
    spelled,
    types_without_llama_cpp,
)
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    add_gpu_argument,
    add_json_argument,
    add_run_argument,
    better_weights,
    input_path,
    positive_float,
    positive_int,
)
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.written_rows import TRAIN, VALIDATION, WrittenRows, write_rows
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from qlora_tui.export.jobs import FILES, write_job
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing
from qlora_tui.formatting import align_columns
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.exported import ExportedRecipe, export_recipe
from qlora_tui.recipe.fields import format_value
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import find_run

if TYPE_CHECKING:
    from qlora_tui.runs.exports import ExportRequest

_FORMS = "gguf|ollama|merge|adapter|hub|recipe|job"
_NEW_FOLDER = "the folder to write; it must not exist yet"
_NEXT = {"axolotl": "axolotl train axolotl.yml", "script": "python train.py"}


def run(args: argparse.Namespace) -> CommandResult:
    """Export a run's adapter or model, or a recipe, in the requested form."""
    if args.form == "recipe":
        return _run_recipe(args)
    if args.form == "job":
        return _run_job(args)
    from qlora_tui.chat.chat_sources import choose_adapter, run_source
    from qlora_tui.export.unfinished_files import export_problems
    from qlora_tui.gpu.torch_env import configure_torch_env, faster_imports
    from qlora_tui.runs.exports import leave_gpu_to_runs

    request = _form_request(args)
    request = replace(request, checkpoint=args.checkpoint, compared_tokens=args.compared_tokens)
    run = find_run(args.run_id)
    source = run_source(run)
    adapter_name = choose_adapter(source, checkpoint=request.checkpoint)
    for note in (leave_gpu_to_runs(), "" if args.checkpoint else better_weights(run, "export")):
        if note:
            print(note, file=sys.stderr)
    configure_torch_env()
    # Until this process ends, whoever deletes the run is asked for confirmation.
    hold_folder(run.path)
    with export_problems(), ProgressLine() as line:
        with faster_imports():
            from qlora_tui.export.forms import export_form

        written = export_form(run, request, source, adapter_name, partial(line.show, is_due=True))
    if written.problem:
        print(f"Refused: {written.problem}", file=sys.stderr)
    return CommandResult(written.result, written.text, EXIT_FAILURE if written.problem else 0)


def _run_recipe(args: argparse.Namespace) -> CommandResult:
    """Write the recipe and its rows for another trainer; report on stderr what is omitted."""
    out: Path = args.out.expanduser().absolute()
    refuse_existing(out)
    recipe = _recipe_or_run(args.recipe)
    tokenizer = ChatTokenizer.from_folder(resolve_model(recipe.model.id).folder, recipe.model.chat_template)
    with ProgressLine() as line:
        prepared = prepare_dataset(recipe, tokenizer, lambda done: line.show(f"reading rows: {done.rows:,}"))
    with draft_folder(out) as draft:
        folder = draft / "recipe"
        folder.mkdir(mode=0o755)
        rows = write_rows(recipe, prepared, tokenizer.traits, folder)
        exported = export_recipe(recipe, args.target, (TRAIN, VALIDATION) if rows.validation else (TRAIN,))
        (folder / exported.name).write_text(exported.text, encoding="utf-8")
        publish_new(folder, out)
    if not args.json:
        print(_account(rows, exported), file=sys.stderr)
    data = {"path": str(out), **msgspec.to_builtins(rows), "left_out": msgspec.to_builtins(exported.left_out)}
    return CommandResult(data, f"Wrote {out}. To train, run in that folder: {_NEXT[args.target]}")


def _add_places(form: argparse.ArgumentParser) -> None:
    """Add the arguments of a form that writes a recipe to a folder: the recipe and the folder."""
    form.add_argument("recipe", type=input_path, metavar="RECIPE", help="a recipe.toml, or a run")
    form.add_argument("out", metavar="OUT", type=Path, help=_NEW_FOLDER)


def _add_recipe_arguments(form: argparse.ArgumentParser) -> None:
    """Add the arguments of `export recipe`."""
    _add_places(form)
    form.add_argument(
        "--as",
        dest="target",
        choices=tuple(_NEXT),
        default="script",
        help="script (default): a Python script with transformers, peft and trl; axolotl: its YAML",
    )
    add_json_argument(form)


def _recipe_or_run(name: str) -> Recipe:
    """Return the recipe in a file, or the recipe of a run. Raises UserError."""
    path = Path(name)
    return build_recipe(file=path) if path.suffix == ".toml" else find_run(name).recipe()


def _account(rows: WrittenRows, exported: ExportedRecipe) -> str:
    """Return a report on what was written and what was omitted."""
    lines = [f"{rows.train:,} samples to train on, {rows.validation:,} for validation."]
    if rows.weighted:
        lines.append(
            "The loss weights of answers were not exported, because the other trainer has no counterpart."
        )
    if exported.left_out:
        lines.append(f"Settings without a counterpart ({len(exported.left_out)}):")
        lines += align_columns([[f"  {one.key}", format_value(one.value)] for one in exported.left_out])
    return "\n".join(lines)


def _run_job(args: argparse.Namespace) -> CommandResult:
    """Write the job's folder; return the command that starts the job. Raises UserError."""
    out: Path = args.out.expanduser().absolute()
    refuse_existing(out)
    recipe = _recipe_or_run(args.recipe)
    with draft_folder(out) as draft:
        folder = draft / "job"
        folder.mkdir(mode=0o755)
        write_job(recipe, args.scheduler, args.accelerator, folder)
        publish_new(folder, out)
    file, command = FILES[args.scheduler]
    data = {"path": str(out), "file": str(out / file), "command": command}
    return CommandResult(data, f"Wrote the folder {out}. Read its {file}, then run in that folder: {command}")


def _add_job_arguments(form: argparse.ArgumentParser) -> None:
    """Add the arguments of `export job`."""
    _add_places(form)
    form.add_argument(
        "--as",
        dest="scheduler",
        choices=tuple(FILES),
        required=True,
        help="the scheduler of the job; for Slurm, `train --on` submits a job directly",
    )
    form.add_argument(
        "--accelerator",
        metavar="GPU",
        default="L4",
        help="kind of GPU to rent (default: L4)",
    )
    add_json_argument(form)


def _form_request(args: argparse.Namespace) -> ExportRequest:
    """Return the request, from the arguments of the chosen form (``hub``, ``gguf``, …). Raises UserError."""
    from qlora_tui.runs.exports import ExportRequest, ollama_folder

    match args.form:
        case "ollama":
            folder = args.dir.expanduser().absolute() if args.dir else ollama_folder(args.name, Path.cwd())
            return ExportRequest(
                form="ollama",
                out=args.name,
                file_type=_types(args.quant or DEFAULT_TYPE),
                folder=str(folder),
                replace_model=args.replace,
            )
        case "hub":
            if args.quant and args.what != "gguf":
                raise UserError(
                    "--quant and --form do not go together",
                    what=f"--quant works only with --form gguf, but --form {args.what} was given.",
                    fix="Leave out one of them, or use --form gguf.",
                    exit_code=EXIT_USAGE,
                )
            return ExportRequest(
                form=f"hub-{args.what}",  # type: ignore[arg-type]  # one of the choices
                out=args.repo,
                file_type=_types(args.quant or DEFAULT_TYPE),
                is_public=args.public,
            )
    out = args.out.expanduser().absolute()
    request = ExportRequest(form=args.form, out=str(out))
    if args.form == "merge":
        return replace(request, base=args.base)
    if args.form == "gguf":
        types = _types(",".join(args.quant or [DEFAULT_TYPE]))
        return replace(request, file_type=types, within=args.within)
    return request


def _types(text: str) -> str:
    """Return comma-separated file types in their canonical spelling; unknown types are unchanged."""
    return ",".join(spelled(name.strip()) for name in text.split(","))


def _arguments(parser: argparse.ArgumentParser) -> None:
    from qlora_tui.runs.exports import COMPARED_TOKENS

    forms = parser.add_subparsers(dest="form", metavar=_FORMS, required=True)
    gguf = forms.add_parser("gguf", help="adapter and base as a GGUF file, for llama.cpp and LM Studio")
    ollama = forms.add_parser("ollama", help="a model in Ollama: GGUF file, Modelfile, `ollama create`")
    merge = forms.add_parser("merge", help="adapter and base as one 16-bit model folder")
    adapter = forms.add_parser("adapter", help="the adapter alone, checked for vLLM")
    hub = forms.add_parser("hub", help="a private repository on the Hub, with a model card")
    recipe = "the recipe and its rows for axolotl, or as a script of transformers, peft and trl"
    _add_recipe_arguments(forms.add_parser("recipe", help=recipe))
    job = "the recipe and its data as a job for Slurm, SkyPilot, dstack or Modal"
    _add_job_arguments(forms.add_parser("job", help=job))
    all_forms = (gguf, ollama, merge, adapter, hub)
    for form in all_forms:
        add_run_argument(form)
    for form, out in (
        (merge, _NEW_FOLDER),
        (gguf, "the .gguf file to write, or a folder for several types"),
        (adapter, _NEW_FOLDER),
    ):
        form.add_argument("out", metavar="OUT", type=Path, help=out)
    merge.add_argument(
        "--base",
        choices=("best", "original", "dequantized"),
        default="best",
        help="base weights to merge into: the original 16-bit weights, or the dequantized 4-bit weights; "
        "best (default): whichever answers more like the trained model",
    )
    gguf.add_argument(
        "--quant",
        action="append",
        metavar="TYPE",
        help=f"{', '.join(types_without_llama_cpp())}; if llama.cpp is installed, also "
        f"{', '.join(filter(needs_llama_cpp, FILE_TYPES))}; `auto`: the smallest type that stays within the "
        f"--within limit; repeatable (default: {DEFAULT_TYPE})",
    )
    gguf.add_argument(
        "--within",
        type=positive_float,
        metavar="KL",
        help="maximum mean KL divergence from the adapter, in nats (0.03 with auto)",
    )
    ollama.add_argument(
        "name", metavar="NAME", help="the model's name in Ollama, such as tickets or tickets:8b"
    )
    _add_one_type(ollama)
    ollama.add_argument(
        "--dir",
        type=Path,
        metavar="FOLDER",
        help="where to write the GGUF file and the Modelfile (default: NAME-ollama in the current folder)",
    )
    ollama.add_argument(
        "--replace",
        action="store_true",
        help="replace an existing model of this name in Ollama",
    )
    hub.add_argument("repo", metavar="REPO", help="owner/name, or a name in the token's account")
    hub.add_argument(
        "--form",
        dest="what",
        choices=("adapter", "merged", "gguf"),
        default="adapter",
        help="what to upload: the adapter alone (default), the merged 16-bit model, or a GGUF file",
    )
    _add_one_type(hub)
    hub.add_argument(
        "--public", action="store_true", help="make the repository public; by default, only you can read it"
    )
    for form in all_forms:
        form.add_argument(
            "--checkpoint", type=int, metavar="STEP", help="export a checkpoint instead of the final adapter"
        )
        form.add_argument(
            "--compare-tokens",
            dest="compared_tokens",
            type=positive_int,
            default=COMPARED_TOKENS,
            metavar="N",
            help="compare answers on validation rows with N trained tokens in total "
            f"(default: {COMPARED_TOKENS:,})",
        )
        add_json_argument(form)
        add_gpu_argument(form)


def _add_one_type(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quant",
        metavar="TYPE",
        help="a type of `export gguf`, or auto: the smallest type whose answers stay close to the adapter's "
        f"(default: {DEFAULT_TYPE})",
    )


SUBCOMMANDS = {"export": Subcommand(run, _arguments, uses_gpu=True)}
