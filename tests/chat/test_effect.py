"""The verdict on an adapter, against figures worked out another way."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from tests.chat.measured import EFFECT

COLORS = ("red", "blue", "green")


@pytest.fixture
def source(tiny_source: ChatSource, tmp_path: Path) -> ChatSource:
    """The tiny model on a run's data: six conversations to learn from and three held out."""
    for name, count in (("train", 6), ("held-out", 3)):
        rows = (
            [
                {"role": "user", "content": f"what is colour {i} of {name}"},
                {"role": "assistant", "content": f"it is {COLORS[i % 3]}"},
            ]
            for i in range(count)
        )
        lines = (json.dumps({"messages": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = Data(
        sources=(Source(path=str(tmp_path / "train.jsonl")),),
        validation_path=str(tmp_path / "held-out.jsonl"),
    )
    return msgspec.structs.replace(tiny_source, recipe=msgspec.structs.replace(tiny_source.recipe, data=data))


def scores_of(model: Any, conversations: Any) -> list[tuple[Any, Any]]:
    import torch

    scores = []
    for i in range(len(conversations)):
        ids = torch.tensor([list(conversations.token_ids(i))])
        trained = torch.tensor(list(conversations.loss_mask(i)))[1:].bool()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][trained].double()
        scores.append((logits.log_softmax(-1), ids[0, 1:][trained]))
    return scores


@pytest.mark.slow
def test_the_figures_are_those_of_peft_and_the_definitions(source: ChatSource) -> None:
    import torch
    import transformers
    from peft import PeftModel

    from qlora_tui.chat.effect_measurement import measure_effect
    from qlora_tui.chat.loading import load_session
    from qlora_tui.data.dataset import prepare_dataset
    from qlora_tui.data.tokenizer import ChatTokenizer

    unquantized = msgspec.structs.replace(
        source.recipe, quantization=msgspec.structs.replace(source.recipe.quantization, method="none")
    )
    source = msgspec.structs.replace(source, recipe=unquantized)
    folder = Path(source.recipe.model.id)
    effect = measure_effect(load_session(source), "adapter")

    library: Any = transformers
    plain = library.AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
    held_out = prepare_dataset(source.recipe, ChatTokenizer.from_folder(folder)).validation
    base = scores_of(plain, held_out)
    tuned: Any = PeftModel.from_pretrained(plain, source.adapters["adapter"])
    adapter = scores_of(tuned, held_out)
    q, p = torch.cat([s for s, _ in base]), torch.cat([s for s, _ in adapter])
    came = torch.cat([t for _, t in base])
    assert (effect.samples, effect.tokens, effect.turns) == (3, len(came), 3)
    assert effect.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert effect.base_loss == pytest.approx(float(-q.gather(-1, came[:, None]).mean()), rel=1e-4)
    assert effect.adapter_loss == pytest.approx(float(-p.gather(-1, came[:, None]).mean()), rel=1e-4)
    assert effect.changed_choices == pytest.approx(float((q.argmax(-1) != p.argmax(-1)).double().mean()))
    merged = dict(tuned.merge_and_unload().state_dict())
    for change in effect.layers:
        names = [n for n in merged if f"layers.{change.layer}." in n and "proj" in n]
        moved = sum(float((merged[n] - weights[n]).square().sum()) for n in names)
        held = sum(float(weights[n].square().sum()) for n in names)
        assert change.relative == pytest.approx((moved / held) ** 0.5, rel=1e-4)
    assert [change.layer for change in effect.layers] == [0, 1]


@pytest.mark.slow
def test_it_can_be_ended_early_and_needs_held_out_data(source: ChatSource) -> None:
    from qlora_tui.chat.effect_measurement import measure_effect
    from qlora_tui.chat.loading import load_session

    session = load_session(source)
    stop = Event()
    statuses: list[str] = []

    def on_status(words: str) -> None:
        statuses.append(words)
        stop.set()

    assert measure_effect(session, "adapter", on_status=on_status, stop=stop).samples == 1
    assert statuses == ["Comparing on conversation 1 of 3", "Comparing the weights"]
    with pytest.raises(UserError, match="no adapter to compare"):
        measure_effect(session, "base")
    data = msgspec.structs.replace(source.recipe.data, validation_path="", validation_fraction=0.0)
    session.source = msgspec.structs.replace(source, recipe=msgspec.structs.replace(source.recipe, data=data))
    with pytest.raises(UserError, match="No validation conversations"):
        measure_effect(session, "adapter")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "The adapter changes 38% of next-token choices on 12 held-out conversations;"
            " it fits them better (loss 2.310 → 1.420) and ends its turns.",
        ),
        (
            {"changed_choices": 0.004, "adapter_loss": 2.4, "turns_ended": 4, "samples": 1},
            "The adapter hardly changes the model: 0.4% of next-token choices on 1 held-out conversation;"
            " it fits them worse (loss 2.310 → 2.400) and ends only 4 of 12 turns.",
        ),
        (
            {"token_rows": ("<|im_end|>", "<|im_start|>", "<a>", "<b>")},
            "The adapter, with trained rows for <|im_end|>, <|im_start|>, <a> and 1 more, changes 38% of"
            " next-token choices on 12 held-out conversations;"
            " it fits them better (loss 2.310 → 1.420) and ends its turns.",
        ),
        (
            {"adapter_name": "step-40", "turns": 0},
            "The checkpoint of step 40 changes 38% of next-token choices on 12 held-out conversations;"
            " it fits them better (loss 2.310 → 1.420).",
        ),
    ],
)
def test_the_verdict_is_one_plain_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert msgspec.structs.replace(EFFECT, **changes).sentence == sentence
