"""Decisions on public labeled text, with wrong labels planted, next to logistic regression on TF-IDF.

    python -m bench.decide --train train_5500.label --test TREC_10.label [--state FOLDER] [--json]

Reads the questions of TREC (Li and Roth 2002, a line ``CLASS:fine question``) or a CSV file of text and label
such as BANKING77's (PolyAI, CC BY 4.0). Draws training, validation and test rows, gives a share of the
training rows another label, and trains SmolLM2-135M-Instruct on them as a user would: ``train``,
``evaluate``, ``predict`` and ``data blame``. scikit-learn's logistic regression on TF-IDF gets the same
training rows and picks its strength on the same validation rows. Both are judged on the same test rows.

With ``--state`` runs stay in a folder, and what is there already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
SETTINGS = (
    "data.max_length=128",
    "training.gradient_accumulation=2",
    "training.micro_batch_size=1",
    "training.learning_rate=5e-4",
    "training.general_prompts=0",
    "training.eval_every=0",
)
STRENGTHS = (0.1, 1.0, 10.0, 100.0)


def main() -> int:
    """Train, decide, compare; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", required=True, type=Path, help="labeled texts to draw training rows from")
    parser.add_argument("--test", required=True, type=Path, help="labeled texts to draw test rows from")
    parser.add_argument(
        "--rows", type=int, nargs=3, default=(420, 140, 300), metavar=("TRAIN", "VAL", "TEST")
    )
    parser.add_argument("--wrong", type=float, default=0.1, help="share of training rows with a wrong label")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--state", type=Path, help="folder that keeps the run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = measured(args, (args.state or Path(temporary)).absolute())
    print(
        json.dumps(report)
        if args.json
        else "\n".join(f"{name:<28} {value}" for name, value in report.items())
    )
    return 0


def labeled(path: Path) -> list[tuple[str, str]]:
    """Return text and label of each row, in an order that is the same each time."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [(text, label.replace("_", " ")) for text, label in list(csv.reader(file))[1:]]
    else:
        lines = path.read_text("latin-1").splitlines()
        rows = [(text, TREC[tag.split(":")[0]]) for tag, _, text in (line.partition(" ") for line in lines)]
    random.Random(0).shuffle(rows)
    return rows


def measured(args: argparse.Namespace, state: Path) -> dict[str, Any]:
    """Return all figures by name."""
    from bench.training import say

    state.mkdir(parents=True, exist_ok=True)
    count, held_out, tested = args.rows
    rows, test = labeled(args.train), labeled(args.test)[:tested]
    train, validation = rows[:count], rows[count : count + held_out]
    labels = sorted({label for _, label in rows})
    draw = random.Random(1)
    wrong = set(draw.sample(range(count), round(args.wrong * count)))
    given = [
        (text, draw.choice([each for each in labels if each != label]) if number in wrong else label)
        for number, (text, label) in enumerate(train)
    ]
    files = {name: state / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for name, part in (("train", given), ("validation", validation)):
        write(files[name], [{"text": text, "label": label} for text, label in part])
    write(files["test"], [{"text": text} for text, _ in test])
    run = trained(state, files, args.epochs)
    say("decisions on the test rows")
    out = state / "decided.jsonl"
    if not out.exists():
        command(state, "predict", str(files["test"]), "--run", run, "-o", str(out), "--probabilities")
    decided = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [label for _, label in test]
    report: dict[str, Any] = {"training rows": f"{count}, {len(wrong)} with a wrong label"}
    ours = [{each: row["predicted_probabilities"].get(each, 0.0) for each in labels} for row in decided]
    report |= {f"ours, {name}": value for name, value in judged(ours, wanted).items()}
    evaluation = json.loads(command(state, "evaluate", run, "--json"))
    decisions = evaluation["decisions"]
    report["base accuracy, validation"] = round(decisions["base"]["accuracy"]["value"], 3)
    for name in ("before", "after"):
        for measure in ("accuracy", "log_loss", "calibration_error"):
            report[f"validation {measure} {name}"] = round(decisions[name][measure]["value"], 3)
    report["temperature"] = round(decisions["calibration"]["temperature"], 2)
    baseline, suspected = by_regression(given, validation, test, labels)
    report |= {f"TF-IDF, {name}": value for name, value in judged(baseline, wanted).items()}
    say("the loss of each training row")
    losses = json.loads(command(state, "data", "blame", run, "--json"))
    ranked = [row["row"] - 1 for row in losses["rows"]]
    for share in (0.1, 0.2):
        first = round(share * count)
        report[f"wrong labels in first {share:.0%}, ours"] = round(
            len(wrong & set(ranked[:first])) / len(wrong), 3
        )
        report[f"wrong labels in first {share:.0%}, TF-IDF"] = round(
            len(wrong & set(suspected[:first])) / len(wrong), 3
        )
    return report


def trained(state: Path, files: dict[str, Path], epochs: float) -> str:
    """Return the id of the run, trained now or before."""
    from bench.training import say
    from qlora_tui.demo.demo_model import ensure_model

    runs = json.loads(command(state, "runs", "--json"))
    if not any(run["state"] == "finished" for run in runs["runs"]):
        model = ensure_model(say)
        settings = [f"data.validation_path={files['validation']}", f"training.epochs={epochs}", *SETTINGS]
        say("training")
        arguments = [part for setting in settings for part in ("--set", setting)]
        command(state, "train", "--model", str(model), "--data", str(files["train"]), *arguments)
    return "last"


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as JSONL, unless they are there: a changed time would be other data."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def command(state: Path, *arguments: str) -> str:
    """Return the output of a command of this program, whose runs are in ``state``."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state), "XDG_DATA_HOME": str(state)}
    argv = [sys.executable, "-m", "qlora_tui", *arguments]
    return subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def judged(probabilities: Sequence[dict[str, float]], wanted: Sequence[str]) -> dict[str, float]:
    """Return accuracy, log loss and calibration error of probabilities by label on test rows."""
    import torch

    from qlora_tui.training.calibration import calibration_error

    chosen = [max(row, key=row.__getitem__) for row in probabilities]
    right = [one == other for one, other in zip(chosen, wanted, strict=True)]
    confidence = torch.tensor([max(row.values()) for row in probabilities])
    losses = [-math.log(max(row[label], 1e-12)) for row, label in zip(probabilities, wanted, strict=True)]
    return {
        "test accuracy": round(sum(right) / len(right), 3),
        "test log loss": round(sum(losses) / len(losses), 3),
        "test calibration error": round(calibration_error(confidence, torch.tensor(right)), 3),
    }


def by_regression(
    given: Sequence[tuple[str, str]],
    validation: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    labels: Sequence[str],
) -> tuple[list[dict[str, float]], list[int]]:
    """Return scikit-learn's probabilities of the test rows, and training rows, least probable label first.

    The training rows are judged in five folds, each by the other four.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    texts, answers = [text for text, _ in given], [label for _, label in given]

    def pipeline(strength: float) -> Any:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        return make_pipeline(vectorizer, LogisticRegression(C=strength, max_iter=1000))

    def probabilities(model: Any, rows: Sequence[str]) -> list[dict[str, float]]:
        found = model.predict_proba(rows)
        return [
            dict.fromkeys(labels, 0.0) | dict(zip(model.classes_, map(float, row), strict=True))
            for row in found
        ]

    def validation_loss(strength: float) -> float:
        model = pipeline(strength).fit(texts, answers)
        found = probabilities(model, [text for text, _ in validation])
        rows = [[row[label] for label in labels] for row in found]
        return float(log_loss([label for _, label in validation], rows, labels=labels))

    best = min(STRENGTHS, key=validation_loss)
    model = pipeline(best).fit(texts, answers)
    folds = cross_val_predict(pipeline(best), texts, answers, cv=5, method="predict_proba")
    places = {label: place for place, label in enumerate(sorted(set(answers)))}
    own = [float(row[places[label]]) for row, label in zip(folds, answers, strict=True)]
    return probabilities(model, [text for text, _ in test]), sorted(range(len(own)), key=own.__getitem__)


if __name__ == "__main__":
    sys.exit(main())
