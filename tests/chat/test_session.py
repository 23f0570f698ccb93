"""Answers, endings, settings and reuse, against transformers' and peft's own answers."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from qlora_tui.chat.chat_types import GREEDY, ChatSource, GenerationResult, Sampling
from qlora_tui.checksums import write_checksums
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError
from qlora_tui.locks import is_held
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.runs.directory import create_run
from tests.chat.adapters import make_adapter
from tests.runs.test_check import flip
from tests.training.families import build
from tests.training.tiny_model import make_tiny_model
from tests.training.trained_weights import LENGTH_SCALED

pytestmark = pytest.mark.slow

QUESTION = (Message("user", "what is the colour of the fox"),)
SHORT = msgspec.structs.replace(GREEDY, max_new_tokens=12)


@pytest.fixture(scope="module")
def session(tiny_source: ChatSource) -> Any:
    from qlora_tui.chat.loading import load_session

    return load_session(tiny_source)


def said(
    session: Any,
    adapter_name: str = "base",
    messages: Sequence[Message] = QUESTION,
    sampling: Sampling = SHORT,
) -> GenerationResult:
    reply = session.ask(messages, adapter_name=adapter_name, sampling=sampling)
    pieces = list(reply)
    assert "".join(piece.text for piece in pieces if not piece.thought) == reply.outcome.text
    outcome = reply.outcome
    assert isinstance(outcome, GenerationResult)
    return outcome


def test_keys_follow_the_frequencies_of_the_whole_conversation(tiny_source: ChatSource, session: Any) -> None:
    from qlora_tui.chat.session import ChatSession

    model = build("phi3", **LENGTH_SCALED["phi3 longrope"])
    source = msgspec.structs.replace(tiny_source, adapters={})
    chat = ChatSession(source, model, session.tokenizer, session.compute_device)
    ids, cache = [3 + 7 * n % 250 for n in range(40)], chat.new_cache()

    def is_that_of_one_pass(count: int) -> bool:
        start = len(cache.token_ids)
        logits = chat.next_logits("base", ids[start:count], cache)
        return torch.allclose(logits, model(input_ids=torch.tensor([ids[:count]])).logits[:, -1], atol=1e-4)

    assert [is_that_of_one_pass(count) for count in (15, 20, 21, 22, 40)] == [True] * 5
    assert cache.reuse(ids[:12]) == 0 and is_that_of_one_pass(12)


def test_the_trainers_samples_are_the_greedy_answers_of_chat(tiny_source: ChatSource) -> None:
    from qlora_tui.chat.loading import load_session
    from qlora_tui.training.answers import SAMPLE_TOKENS, generate_samples

    session = load_session(tiny_source)
    question = QUESTION[0].content
    answer = said(session, sampling=msgspec.structs.replace(GREEDY, max_new_tokens=SAMPLE_TOKENS)).text
    settings = session._model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 8.0
    settings.no_repeat_ngram_size = 1
    ((_, sampled),) = generate_samples(session._model, session.tokenizer, (question,), session.device)
    assert sampled and sampled == answer.strip()


def reference(session: Any, source: ChatSource, adapter: str | None, tokens: int) -> str:
    """What plain transformers and peft say, greedily."""
    import torch
    import transformers
    from peft import PeftModel

    folder = source.recipe.model.id
    library: Any = transformers
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    four_bit = library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=session.compute_device.dtype,
    )
    model = library.AutoModelForCausalLM.from_pretrained(
        folder, dtype=session.compute_device.dtype, quantization_config=four_bit
    )
    for module in model.modules():
        # On a CPU with AVX512-BF16 bitsandbytes repacks weights in the first forward; DoRA's norms, which
        # peft takes of them, are then of garbage.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    turns = [{"role": m.role, "content": m.content} for m in QUESTION]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    given = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return str(tokenizer.decode(given[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("adapter_name", ["base", "adapter", "step-2"])
def test_each_voice_says_what_plain_transformers_and_peft_say(
    session: Any, tiny_source: ChatSource, adapter_name: str
) -> None:
    expected = reference(session, tiny_source, tiny_source.adapters.get(adapter_name), SHORT.max_new_tokens)
    assert said(session, adapter_name).text == expected


def test_side_by_side_answers_do_not_affect_each_other(session: Any) -> None:
    alone = {adapter_name: said(session, adapter_name).text for adapter_name in session.adapter_names}
    replies = {
        adapter_name: session.ask(QUESTION, adapter_name=adapter_name, sampling=SHORT)
        for adapter_name in session.adapter_names
    }
    growing = {adapter_name: iter(reply) for adapter_name, reply in replies.items()}
    while growing:
        for adapter_name in list(growing):
            if next(growing[adapter_name], None) is None:
                del growing[adapter_name]
    assert {adapter_name: reply.outcome.text for adapter_name, reply in replies.items()} == alone
    assert len(set(alone.values())) == 3


def test_a_second_turn_reads_only_new_tokens_and_answers_equally(
    session: Any, tiny_source: ChatSource
) -> None:
    from qlora_tui.chat.loading import load_session

    first = said(session)
    longer = (*QUESTION, Message("assistant", first.text), Message("user", "and the dog"))
    continued = said(session, messages=longer)
    fresh = said(load_session(tiny_source), messages=longer)
    assert continued.reused_tokens >= first.prompt_tokens
    assert fresh.reused_tokens == 0
    assert continued.text == fresh.text


def test_the_seed_decides_the_answer(session: Any) -> None:
    warm = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=16, seed=1)
    once, again = said(session, sampling=warm).text, said(session, sampling=warm).text
    other = said(session, sampling=msgspec.structs.replace(warm, seed=2)).text
    assert once == again != other


def test_a_repetition_penalty_breaks_a_loop(session: Any) -> None:
    looping = said(session, sampling=msgspec.structs.replace(GREEDY, max_new_tokens=60)).text
    penalised = said(
        session, sampling=msgspec.structs.replace(GREEDY, max_new_tokens=60, repetition_penalty=5.0)
    ).text
    assert len(set(penalised.split())) > len(set(looping.split()))


def test_an_answer_ends_at_the_turn_end_without_showing_it(session: Any) -> None:
    import torch

    (end_id,) = session.end_ids
    head = session._model.lm_head.weight
    with torch.no_grad():
        prefix_cache = head[end_id].clone()
        try:
            scores = session.next_logits("base", session.prompt(QUESTION), _fresh(session))
            likeliest = head[int(scores.argmax())]
            head[end_id] = likeliest * 2
            outcome = said(session)
        finally:
            head[end_id] = prefix_cache
    assert (outcome.ending, outcome.text, outcome.new_tokens) == ("turn end", "", 1)


def test_it_says_when_it_reached_the_most_tokens(session: Any) -> None:
    outcome = said(session)
    assert (outcome.ending, outcome.new_tokens) == ("most tokens", 12)
    assert outcome.tokens_per_s > 0
    assert outcome.first_token_s > 0


def test_stop_ends_an_answer_before_its_next_token(session: Any) -> None:
    reply = session.ask(QUESTION, sampling=msgspec.structs.replace(GREEDY, max_new_tokens=1000))
    pieces = iter(reply)
    first = next(pieces)
    reply.stop()
    rest = list(pieces)
    assert reply.outcome.ending == "stopped"
    assert reply.outcome.text == first.text + "".join(piece.text for piece in rest)
    assert reply.outcome.new_tokens <= 4


def test_an_answer_ends_where_the_context_is_full(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "context_length", len(session.prompt(QUESTION)) + 5)
    outcome = said(session, sampling=msgspec.structs.replace(GREEDY, max_new_tokens=4000))
    assert (outcome.ending, outcome.new_tokens) == ("context full", 5)


def test_a_conversation_longer_than_the_context_is_refused(session: Any) -> None:
    with pytest.raises(UserError, match="too long"):
        session.ask((Message("user", "fox " * 4000),))


def test_an_unknown_adapter_is_rejected_naming_the_known_ones(session: Any) -> None:
    with pytest.raises(UserError, match="base, adapter, step-2"):
        session.ask(QUESTION, adapter_name="step-9")


def test_an_adapter_of_another_model_is_refused(
    session: Any, tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.chat.loading import load_session
    from tests.chat.adapters import make_adapter
    from tests.training.tiny_model import make_tiny_model

    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    adapter = make_adapter(other, tmp_path / "adapter")
    source = msgspec.structs.replace(tiny_source, adapters={"adapter": str(adapter)})
    fresh = load_session(source)
    with pytest.raises(UserError, match="does not fit"):
        fresh.ask(QUESTION, adapter_name="adapter")
    assert said(fresh).text == said(session).text


def test_a_run_is_in_use_while_its_adapter_is_loaded(tiny_source: ChatSource) -> None:
    from qlora_tui.chat.loading import load_session

    run = create_run(tiny_source.recipe)
    adapter = shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    session = load_session(msgspec.structs.replace(tiny_source, adapters={"adapter": str(adapter)}))
    assert is_held(run.path)
    del session
    gc.collect()
    assert not is_held(run.path)


def test_dora_and_plain_adapters_answer_as_in_peft(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.chat.loading import load_session
    from tests.chat.adapters import make_adapter

    dora = str(make_adapter(tiny_model, tmp_path / "dora", use_dora=True, use_rslora=True))
    source = msgspec.structs.replace(tiny_source, adapters={**tiny_source.adapters, "step-8": dora})
    session = load_session(source)
    order = ("adapter", "base", "step-8", "adapter", "base", "step-8")
    texts = [said(session, adapter_name).text for adapter_name in order]
    assert texts[:3] == texts[3:]
    assert texts[2] == reference(session, source, dora, SHORT.max_new_tokens)
    assert texts[0] == reference(session, source, source.adapters["adapter"], SHORT.max_new_tokens)


def test_trained_token_rows_answer_as_in_peft_beside_other_adapters(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.chat.loading import load_session
    from tests.chat.adapters import make_adapter

    ids = {"model.embed_tokens": [1, 2, 300], "lm_head": [1, 2, 300]}
    rows = {
        adapter_name: str(
            make_adapter(tiny_model, tmp_path / adapter_name, trainable_token_indices=ids, use_dora=dora)
        )
        for adapter_name, dora in (("step-5", False), ("step-6", True))
    }
    source = msgspec.structs.replace(tiny_source, adapters={**tiny_source.adapters, **rows})
    session = load_session(source)
    # The last is read last, and from then on all are spoken as peft does.
    order = ("step-5", "adapter", "base", "step-6")
    texts = [said(session, adapter_name).text for adapter_name in (*order, *order)]
    assert texts[:4] == texts[4:] and len(set(texts)) == 4
    for adapter_name, text in ((adapter_name, texts[order.index(adapter_name)]) for adapter_name in rows):
        assert text == reference(session, source, rows[adapter_name], SHORT.max_new_tokens)


def test_a_trained_embedding_answers_as_in_peft_beside_other_adapters(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.chat.loading import load_session
    from tests.chat.adapters import make_adapter

    whole = ["model.embed_tokens", "lm_head"]
    more = {
        adapter_name: str(
            make_adapter(tiny_model, tmp_path / adapter_name, seed, modules_to_save=whole, use_dora=dora)
        )
        for adapter_name, seed, dora in (("step-5", 1, False), ("step-6", 2, True))
    }
    source = msgspec.structs.replace(tiny_source, adapters={**tiny_source.adapters, **more})
    session = load_session(source)
    order = ("adapter", "step-5", "base", "step-6")
    texts = [said(session, adapter_name).text for adapter_name in (*order, *order)]
    assert texts[:4] == texts[4:] and len(set(texts)) == 4
    for adapter_name, text in zip(order, texts, strict=False):
        if adapter_name != "base":
            assert text == reference(session, source, source.adapters[adapter_name], SHORT.max_new_tokens)
    assert not session.warning
    alone = load_session(tiny_source)
    assert texts[2] == said(alone, "base").text


def test_packed_and_dequantized_4_bit_weights_give_the_same_scores(
    tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qlora_tui.chat import loading as room

    scores = []
    for keep_packed in (True, False):
        with monkeypatch.context() as patch:
            if keep_packed:
                patch.setattr(room, "dequantize_on_cpu", lambda model, device: False)
            session = room.load_session(tiny_source)
        session.ask(QUESTION, adapter_name="adapter")
        scores.append(session.next_logits("adapter", session.prompt(QUESTION), _fresh(session)))
    torch.testing.assert_close(scores[0], scores[1], rtol=2e-2, atol=2e-2)


def test_pickled_adapter_weights_are_never_loaded(tiny_source: ChatSource, tmp_path: Path) -> None:
    from qlora_tui.chat.loading import load_session

    for file in Path(tiny_source.adapters["adapter"]).iterdir():
        name = "adapter_model.bin" if file.suffix == ".safetensors" else file.name
        (tmp_path / name).write_bytes(file.read_bytes())
    session = load_session(msgspec.structs.replace(tiny_source, adapters={"adapter": str(tmp_path)}))
    with pytest.raises(UserError, match="safetensors"):
        session.ask(QUESTION, adapter_name="adapter")


def test_a_damaged_adapter_is_not_loaded(tiny_source: ChatSource, tmp_path: Path) -> None:
    from qlora_tui.chat.loading import load_session

    for file in Path(tiny_source.adapters["adapter"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_checksums(tmp_path)
    flip(tmp_path / "adapter_model.safetensors", -1)
    session = load_session(msgspec.structs.replace(tiny_source, adapters={"adapter": str(tmp_path)}))
    with pytest.raises(UserError, match="The adapter is damaged"):
        session.ask(QUESTION, adapter_name="adapter")


def _fresh(session: Any) -> Any:
    from qlora_tui.chat.decoding import PrefixCache

    return PrefixCache(session._model.config)


@pytest.mark.parametrize(("kind", "title"), [("cuda", "Out of GPU memory"), ("cpu", "Out of memory")])
def test_lack_of_memory_names_the_device_and_other_errors_pass(kind: str, title: str) -> None:
    import torch

    from qlora_tui.chat.session import reported_memory
    from qlora_tui.training.compute_device import ComputeDevice

    device = ComputeDevice(torch.device(kind), "a device", 1 << 30, torch.bfloat16)
    for error in (torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()):
        with pytest.raises(UserError) as raised, reported_memory(device):
            raise error
        assert raised.value.title == title
    with pytest.raises(RuntimeError, match="shapes"), reported_memory(device):
        raise RuntimeError("shapes differ")


def test_a_session_with_streamed_layers_answers_like_another(tmp_path: Path) -> None:
    from qlora_tui.chat.loading import load_session

    folder = make_tiny_model(tmp_path / "deep", num_hidden_layers=4)
    adapters = {"adapter": str(make_adapter(folder, tmp_path / "adapter", seed=1))}
    answers = []
    for count in (0, 3):
        quantization = Quantization(compute_dtype="float32", streamed_layers=count)
        recipe = Recipe(model=Model(id=str(folder)), quantization=quantization)
        statuses: list[str] = []
        source = ChatSource(recipe=recipe, adapters=adapters)
        session = load_session(source, statuses.append, streams=True)
        answers.append([said(session, name).text for name in ("base", "adapter", "base")])
        assert not session.warning
        assert any("3 layers stay in host memory" in status for status in statuses) == (count == 3)
    assert answers[0] == answers[1]
