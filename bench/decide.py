"""Decisions on public labeled text with some wrong labels, compared with logistic regression on TF-IDF.

    python -m bench.decide train_5500.label rt-polarity ori_pqal.json [--seeds 2] [--state FOLDER] [--json]

Reads files as their authors publish them: questions of TREC in six classes (Li and Roth 2002, lines of
``CLASS:fine question``); sentences of film reviews (Pang and Lee 2005, the folder with ``rt-polarity.pos``
and ``.neg``); questions of PubMedQA, answered yes, no or maybe from a paper's conclusion (Jin et al. 2019,
``ori_pqal.json``); or a CSV file of text and label, such as BANKING77 (PolyAI).

For each file and seed, this script draws training, validation and test rows, replaces the labels of some
training rows by others, and trains SmolLM2-135M-Instruct like a user: with ``train``, ``evaluate`` and
``predict``, the last on both test and training rows. scikit-learn's logistic regression on TF-IDF gets the
same training rows, selects its regularization on the same validation rows, and judges its own training rows
in five folds. Figures cover the test rows of all seeds together.

With ``--state``, runs are kept in a folder, and existing results are reused.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
SETTINGS = (
    "training.gradient_accumulation=1",
    "training.micro_batch_size=1",
    "training.learning_rate=5e-4",
    "training.general_prompts=0",
    "training.task_prompts=0",
    "training.eval_every=0",
)
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
RESAMPLES = 1000

Rows = list[tuple[str, str]]
"""Text and label of each row."""


class Judged(NamedTuple):
    """Probabilities of one method for test rows, and its suspicion of training rows."""

    probabilities: list[dict[str, float]]
    """Probability of each label, for each test row."""
    own: list[float]
    """Probability of the given label, for each training row."""


class Trial(NamedTuple):
    """One draw of rows for one task."""

    wanted: list[str]
    """Labels of the test rows."""
    wrong: set[int]
    """Indices of the training rows with a wrong label."""
    ways: dict[str, Judged]
    notes: dict[str, float]
    """Figures of this draw by name."""


def main() -> int:
    """Train, decide and compare; print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="labeled texts")
    parser.add_argument(
        "--rows", type=int, nargs=3, default=(240, 160, 240), metavar=("TRAIN", "VAL", "TEST")
    )
    parser.add_argument("--wrong", type=float, default=0.1, help="share of training rows with a wrong label")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--state", type=Path, help="folder that keeps the runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        state = (args.state or Path(temporary)).absolute()
        for path in args.data:
            trials = [
                trial(args, labeled(path), state / f"{path.stem}-{seed}", seed) for seed in range(args.seeds)
            ]
            report[path.stem] = summary(trials)
    print(json.dumps(report) if args.json else "\n\n".join(table(*item) for item in report.items()))
    return 0


def labeled(path: Path) -> Rows:
    """Return text and label of each row."""
    if path.is_dir():
        return [
            (line.strip(), label)
            for name, label in (("neg", "negative"), ("pos", "positive"))
            for line in (path / f"rt-polarity.{name}").read_text("latin-1").splitlines()
        ]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [(text, label.replace("_", " ")) for text, label in list(csv.reader(file))[1:]]
    if path.suffix == ".json":
        asked = json.loads(path.read_text()).values()
        return [(f"{row['QUESTION']}\n\n{row['LONG_ANSWER']}", row["final_decision"]) for row in asked]
    lines = path.read_text("latin-1").splitlines()
    return [(text, TREC[tag.split(":")[0]]) for tag, _, text in (line.partition(" ") for line in lines)]


def trial(args: argparse.Namespace, rows: Rows, state: Path, seed: int) -> Trial:
    """Draw rows, train on them, and let both methods decide."""
    from bench.training import say

    state.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    rows = draw.sample(list(dict(rows).items()), sum(args.rows))
    count, held_out, _ = args.rows
    train, validation, test = rows[:count], rows[count : count + held_out], rows[count + held_out :]
    labels = sorted({label for _, label in rows})
    wrong = set(draw.sample(range(count), round(args.wrong * count)))
    given = [
        (text, draw.choice([each for each in labels if each != label]) if number in wrong else label)
        for number, (text, label) in enumerate(train)
    ]
    say(state.name)
    probabilities, notes = by_tuning(args, state, given, validation, test, labels)
    ours = Judged(
        probabilities[count:],
        [row[label] for row, (_, label) in zip(probabilities[:count], given, strict=True)],
    )
    temperature = notes["temperature"]
    return Trial(
        wanted=[label for _, label in test],
        wrong=wrong,
        ways={
            "TF-IDF": by_regression(given, validation, test, labels),
            "not calibrated": Judged([sharpened(row, temperature) for row in ours.probabilities], ours.own),
            "qlora-tui": ours,
        },
        notes=notes,
    )


def by_tuning(
    args: argparse.Namespace, state: Path, train: Rows, validation: Rows, test: Rows, labels: Sequence[str]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return a tuned model's probabilities of training and test rows, in this order, and figures by name."""
    from bench.training import say
    from qlora_tui.demo.demo_model import ensure_model

    files = {name: state / f"{name}.jsonl" for name in ("train", "validation", "all")}
    for name, part in (("train", train), ("validation", validation)):
        write(files[name], [{"text": text, "label": label} for text, label in part])
    write(files["all"], [{"text": text} for text, _ in (*train, *test)])
    runs = json.loads(command(state, "runs", "--json"))
    if not any(run["state"] == "finished" for run in runs["runs"]):
        model = ensure_model(say)
        # Use two or three rows per step, whatever their length.
        words = statistics.mean(len(text.split()) for text, _ in train)
        settings = [
            f"data.max_length={128 if words < 30 else 256}",
            f"data.validation_path={files['validation']}",
            f"training.epochs={args.epochs}",
            *SETTINGS,
        ]
        arguments = [part for setting in settings for part in ("--set", setting)]
        command(state, "train", "--model", str(model), "--data", str(files["train"]), *arguments)
    decisions = json.loads(command(state, "evaluate", "last", "--json"))["decisions"]
    out = state / "decided.jsonl"
    if not out.exists():
        command(state, "predict", str(files["all"]), "--run", "last", "-o", str(out), "--probabilities")
    decided = [json.loads(line)["predicted_probabilities"] for line in out.read_text().splitlines()]
    return [{label: row.get(label, 0.0) for label in labels} for row in decided], {
        "temperature": decisions["calibration"]["temperature"],
        "base accuracy on the validation rows": decisions["base"]["accuracy"]["value"],
    }


def sharpened(row: dict[str, float], power: float) -> dict[str, float]:
    """Return probabilities raised to a power, which undoes the temperature of a calibration."""
    raised = {label: value**power for label, value in row.items()}
    total = sum(raised.values())
    return {label: value / total for label, value in raised.items()}


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as JSONL unless the file exists, because a changed time would count as other data."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def command(state: Path, *arguments: str) -> str:
    """Run a command of this program with the runs in ``state``; return its output."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "XDG_DATA_HOME": str(state)}
    argv = [sys.executable, "-m", "qlora_tui", *arguments]
    return subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def by_regression(train: Rows, validation: Rows, test: Rows, labels: Sequence[str]) -> Judged:
    """Return the decisions of scikit-learn's logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    texts, answers = [text for text, _ in train], [label for _, label in train]

    def pipeline(strength: float) -> Any:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        return make_pipeline(vectorizer, LogisticRegression(C=strength, max_iter=1000))

    def probabilities(model: Any, rows: Rows) -> list[dict[str, float]]:
        return [
            dict.fromkeys(labels, 0.0) | dict(zip(model.classes_, map(float, row), strict=True))
            for row in model.predict_proba([text for text, _ in rows])
        ]

    def validation_loss(strength: float) -> float:
        found = probabilities(pipeline(strength).fit(texts, answers), validation)
        rows = [[row[label] for label in labels] for row in found]
        return float(log_loss([label for _, label in validation], rows, labels=labels))

    best = min(STRENGTHS, key=validation_loss)
    folds = cross_val_predict(pipeline(best), texts, answers, cv=5, method="predict_proba")
    places = {label: place for place, label in enumerate(sorted(set(answers)))}
    return Judged(
        probabilities(pipeline(best).fit(texts, answers), test),
        [float(row[places[label]]) for row, label in zip(folds, answers, strict=True)],
    )


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the figures of one task by name, for each method or each draw."""
    import torch

    from qlora_tui.training.calibration import calibration_error

    labels = sorted(trials[0].ways["TF-IDF"].probabilities[0])
    report: dict[str, Any] = {}
    for way in trials[0].ways:
        together = _figures(trials, way, labels)
        draws = [_figures([each], way, labels) for each in trials]
        for name, figure in together.items():
            each = [draw[name]["value"] for draw in draws]
            report.setdefault(name, {})[way] = {**figure, "draws": each}
    draw = torch.Generator().manual_seed(0)
    count = sum(len(each.wanted) for each in trials)
    resamples = [torch.randint(count, (count,), generator=draw) for _ in range(RESAMPLES)]
    sure = {way: _confidence(trials, way, labels) for way in trials[0].ways}
    errors = {
        way: torch.tensor([calibration_error(confidence[rows], right[rows]) for rows in resamples])
        for way, (confidence, right) in sure.items()
    }
    edges = torch.tensor([0.025, 0.975])
    report["calibration error, qlora-tui minus TF-IDF, 95 % interval"] = (
        (errors["qlora-tui"] - errors["TF-IDF"]).quantile(edges).tolist()
    )
    for name in trials[0].notes:
        report[name] = [each.notes[name] for each in trials]
    return report


def _logs(trials: Sequence[Trial], way: str, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the log probabilities (test rows, labels) of some draws, and the right labels (test rows,)."""
    import torch

    rows = [[row[label] for label in labels] for each in trials for row in each.ways[way].probabilities]
    truth = torch.tensor([labels.index(label) for each in trials for label in each.wanted])
    return torch.tensor(rows).double().clamp(min=1e-12).log(), truth


def _confidence(trials: Sequence[Trial], way: str, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the probability of the chosen label of each test row, and whether it is right."""
    logs, truth = _logs(trials, way, labels)
    confidence, chosen = logs.exp().max(-1)
    return confidence, chosen == truth


def _figures(trials: Sequence[Trial], way: str, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the figures of one method over several draws: the value, and the interval if there is one."""
    from qlora_tui.training.calibration import judge_probabilities

    quality = judge_probabilities(*_logs(trials, way, labels))

    def planted(measure: Callable[[Sequence[float], set[int]], float]) -> dict[str, Any]:
        return {"value": statistics.mean(measure(each.ways[way].own, each.wrong) for each in trials)}

    return {
        "accuracy": msgspec.to_builtins(quality.accuracy),
        "log loss": msgspec.to_builtins(quality.log_loss),
        "calibration error": msgspec.to_builtins(quality.calibration_error),
        "  if honest": {"value": quality.honest_error},
        "planted: area under the curve": planted(_area),
        **{
            f"planted: in the first {share:.0%}": planted(partial(_share_found, share=share))
            for share in (0.1, 0.2)
        },
    }


def _area(own: Sequence[float], wrong: set[int]) -> float:
    """Return how often a row with a wrong label is less probable than a row with the right label."""
    others = [value for number, value in enumerate(own) if number not in wrong]
    pairs = [(own[number] < other) + 0.5 * (own[number] == other) for number in wrong for other in others]
    return sum(pairs) / len(pairs)


def _share_found(own: Sequence[float], wrong: set[int], share: float) -> float:
    """Return the share of the wrong labels that are among the least probable ``share`` of the rows."""
    ranked = sorted(range(len(own)), key=own.__getitem__)
    return len(wrong & set(ranked[: round(share * len(own))])) / len(wrong)


def table(name: str, report: dict[str, Any]) -> str:
    """Return the figures of a task in lines: over all draws, then for each draw, with their spread."""
    from qlora_tui.formatting import align_columns

    def shown(figure: dict[str, Any]) -> str:
        low_high = figure.get("interval")
        interval = f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
        return f"{figure['value']:.3f}{interval}"

    def spread(figure: dict[str, Any]) -> str:
        draws = figure["draws"]
        deviation = f" ± {statistics.stdev(draws):.3f}" if len(draws) > 1 else ""
        each = ", ".join(f"{value:.3f}" for value in draws)
        return f"{statistics.mean(draws):.3f}{deviation} ({each})"

    by_way = {label: value for label, value in report.items() if isinstance(value, dict)}
    tables = [
        align_columns(
            [
                (title, *by_way["accuracy"]),
                *((label, *map(cell, figures.values())) for label, figures in by_way.items()),
            ]
        )
        for title, cell in ((name, shown), (f"{name}, each draw", spread))
    ]
    rest = [
        f"{label}: {', '.join(f'{value:.3f}' for value in values)}"
        for label, values in report.items()
        if isinstance(values, list)
    ]
    return "\n".join([*tables[0], "", *tables[1], "", *rest])


if __name__ == "__main__":
    sys.exit(main())
