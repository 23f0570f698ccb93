"""Third-party clients with a server: litellm, and lm-evaluation-harness with `local-completions`.

    python -m bench.real_clients [RUN] --clients .clients-venv/bin/python      (make real-clients)

Serves a run, by default the last one with an adapter, lets litellm chat with it, with and without streaming,
and lets lm-eval score and generate for base and run, with two tasks of its own that need no network. The exit
code is 1 if a client fails, a stream differs from the whole answer, or the base knows fewer than half of
eight capitals (SmolLM2-135M knows all).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_tui.runs.directory import RunDir, find_run
from qlora_tui.serving.model_names import RunsToServe

_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "Greece": "Athens",
    "Germany": "Berlin",
}
_TASKS = {
    "capitals": """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "capitals_written": """
task: capitals_written
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [".", ","], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: true}]
""",
}
_LITELLM = """
import json, sys
import litellm
url, model = sys.argv[1:]
ask = dict(model=f"openai/{model}", api_base=url, api_key="none", temperature=0, max_tokens=24,
           messages=[{"role": "user", "content": "What is the capital of France?"}])
whole = litellm.completion(**ask)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
try:
    litellm.completion(**{**ask, "model": "openai/none"})
    refused = ""
except litellm.NotFoundError as error:
    refused = str(error)
print(json.dumps({"whole": whole.choices[0].message.content, "streamed": "".join(pieces),
                  "tokens": whole.usage.completion_tokens, "refused": refused}))
"""


def main() -> int:
    """Run both clients, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--clients", required=True, help="Python with litellm, lm-eval and transformers")
    args = parser.parse_args()
    run = run_to_serve(args.run)
    scores = {}
    with served(run.id) as (url, _), tempfile.TemporaryDirectory() as folder:
        chat = json.loads(_output(args.clients, "-c", _LITELLM, url, run.id).splitlines()[-1])
        print("litellm:", chat)
        for name in ("base", run.id):
            scores[name] = evaluate(args.clients, url, name, run.adapter_dir, Path(folder))
            print(f"lm-eval, {name}:", scores[name])
    good = chat["whole"] == chat["streamed"] and bool(chat["refused"])
    good = good and scores["base"]["capitals"]["acc,none"] >= 0.5
    print("ok" if good else "FAILED")
    return 0 if good else 1


def run_to_serve(name: str | None) -> RunDir:
    """Return the run with this name, or the newest one with an adapter. Raises UserError."""
    runs = [find_run(name)] if name else RunsToServe().now()
    return next((run for run in runs if run.adapter_dir.is_dir()), runs[0])


@contextmanager
def served(run: str) -> Iterator[tuple[str, int]]:
    """Serve a run inside the block; yield the address of the server and its PID."""
    argv = [sys.executable, "-m", "qlora_tui", "serve", run, "--port", "0", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            if not (line := server.stdout.readline()):
                raise SystemExit("The server ended; the reason is above.")
            yield json.loads(line)["address"], server.pid
        finally:
            server.terminate()


def evaluate(python: str, url: str, model: str, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Return lm-eval's scores of a model of the server, by task and metric."""
    data = folder / "capitals.jsonl"
    names = list(_CAPITALS.values())
    rows = [{"country": c, "choices": [f" {n}" for n in names], "label": i} for i, c in enumerate(_CAPITALS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in _TASKS.items():
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    arguments = f"model={model},base_url={url}/completions,tokenizer={tokenizer},num_concurrent=4"
    out = folder / f"{model}.results"
    harness = ("-m", "lm_eval", "--model", "local-completions", "--model_args", arguments)
    _output(
        python, *harness, f"--tasks={','.join(_TASKS)}", f"--include_path={folder}", f"--output_path={out}"
    )
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text())["results"]  # type: ignore[no-any-return]


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv[:4])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
