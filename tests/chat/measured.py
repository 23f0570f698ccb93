"""A measured adapter, for tests of how it is shown."""

from qlora_tui.chat.chat_types import Effect

EFFECT = Effect(
    adapter_name="adapter",
    samples=12,
    tokens=900,
    mean_kl=0.41,
    changed_choices=0.384,
    base_loss=2.31,
    adapter_loss=1.42,
    turns=12,
    turns_ended=12,
    turns_ended_by_base=3,
    layers=(),
)
