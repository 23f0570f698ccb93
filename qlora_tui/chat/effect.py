"""The effect of an adapter on a model, in figures and in one sentence. Loads no torch."""

from __future__ import annotations

from msgspec import Struct

_NEGLIGIBLE = 0.01
"""Share of changed choices below which an adapter has practically no effect."""
_NAMED = 3
"""Number of tokens named in the sentence."""


class LayerChange(Struct, frozen=True, kw_only=True):
    """Change of the weights of one layer by an adapter."""

    layer: int
    relative: float
    """‖ΔW‖ / ‖W‖ over all its changed weights, Frobenius norms."""


class Effect(Struct, frozen=True, kw_only=True):
    """Comparison of base and adapter on the same held-out conversations."""

    adapter_name: str
    samples: int
    tokens: int
    """Next-token choices compared: those in the loss."""
    mean_kl: float
    """KL(adapter ‖ base) of the next-token distributions, in nats, mean over the choices."""
    changed_choices: float
    """Share of the choices at which the most likely token differs."""
    base_loss: float
    adapter_loss: float
    """Mean cross-entropy of the held-out answers, in nats per token."""
    turns: int
    """Number of turn ends among the choices; 0 where the template has none."""
    turns_ended: int
    """Number of these that the adapter predicts."""
    turns_ended_by_base: int
    warning: str = ""
    """Warning where these figures use logits that differ from those of transformers and peft."""
    token_rows: tuple[str, ...] = ()
    """Tokens with their own trained rows of embedding and head."""
    layers: tuple[LayerChange, ...]

    @property
    def sentence(self) -> str:
        """Return the verdict in one sentence, for readers who skip the figures."""
        where = f"{self.samples} held-out conversation{'s' if self.samples != 1 else ''}"
        much = f"{self.changed_choices:.0%}"
        verb = "changes"
        if self.changed_choices < _NEGLIGIBLE:
            verb, much = "hardly changes the model:", f"{self.changed_choices:.1%}"
        moved = f"The {self._name}{self._rows} {verb} {much} of next-token choices on {where}"
        fits = self.adapter_loss < self.base_loss
        better = "better" if fits else "worse"
        loss = f"it fits them {better} (loss {self.base_loss:.2f} → {self.adapter_loss:.2f})"
        if not self.turns:
            return f"{moved}; {loss}."
        ends = self.turns_ended == self.turns
        turns = "ends its turns" if ends else f"ends only {self.turns_ended} of {self.turns} turns"
        return f"{moved}; {loss} {'and' if fits == ends else 'but'} {turns}."

    @property
    def _rows(self) -> str:
        if not self.token_rows:
            return ""
        others = len(self.token_rows) - _NAMED
        more = f" and {others} more" if others > 0 else ""
        return f", with trained rows for {', '.join(self.token_rows[:_NAMED])}{more},"

    @property
    def _name(self) -> str:
        return (
            "adapter"
            if self.adapter_name == "adapter"
            else f"checkpoint of step {self.adapter_name.removeprefix('step-')}"
        )
