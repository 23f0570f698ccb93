"""Estimates of base models that are larger than a card: resident, and with streamed layers.

    python -m bench.larger_than_card CONFIG_JSON… [--length 1024] [--gib 6 8 12 16 24] [--markdown]

Each model gets the smallest card of the list on which it does not fit as a whole. Nothing is measured here:
the figures are those of ``qlora-tui estimate``, from ``config.json`` alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.cli.subcommand import format_table
from qlora_tui.memory import Device, check_fit, estimate
from qlora_tui.memory.execution import trainer_execution
from qlora_tui.memory.streaming_cost import copied_bytes
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Recipe, Training

GIB = 2**30
HEADINGS = ["model", "card", "resident", "streamed layers", "streamed", "host memory", "copied"]


@dataclass(frozen=True)
class Row:
    """One model on one card; sizes in bytes."""

    model: str
    card_bytes: int
    resident_bytes: int
    streamed_layers: int
    layers: int
    streamed_bytes: int
    host_bytes: int
    copied_bytes: int
    """Bytes that a micro-batch copies to the card."""

    def cells(self) -> list[str]:
        """The row for people."""
        sizes = (self.resident_bytes, self.streamed_bytes, self.host_bytes, self.copied_bytes)
        resident, streamed, host, copied = (f"{size / GIB:.1f} GiB" for size in sizes)
        layers = f"{self.streamed_layers} of {self.layers}"
        return [self.model, f"{self.card_bytes // GIB} GB", resident, layers, streamed, host, copied]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gib", nargs="*", type=int, default=[6, 8, 12, 16, 24])
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    recipe = Recipe(data=Data(max_length=args.length), training=Training(gradient_checkpointing="on"))
    rows = []
    for file in args.configs:
        architecture = parse_architecture(json.loads(file.read_text()))
        row = next(smallest_cards(file.stem.partition("__")[2], recipe, architecture, args.gib), None)
        if row is not None:
            rows.append(row.cells())
    if args.markdown:
        lines = [HEADINGS, ["---"] + ["---:"] * (len(HEADINGS) - 1), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        print(format_table(rows, HEADINGS))


def smallest_cards(model: str, recipe: Recipe, architecture: Architecture, cards: list[int]) -> Iterator[Row]:
    """Yield the cards on which the model fits with streamed layers alone, the smallest first."""
    device = Device()
    resident = estimate(recipe, architecture, device=device)
    for card in sorted(cards):
        available = card * GIB
        if check_fit(resident, available).fits_even_if_tight:
            return
        for count in range(3, architecture.layers + 1):
            changed = replace_setting(recipe, "quantization.streamed_layers", count)
            streamed = estimate(changed, architecture, device=device)
            if check_fit(streamed, available).fits_even_if_tight:
                execution = trainer_execution(changed, device, architecture)
                yield Row(
                    model=model,
                    card_bytes=available,
                    resident_bytes=resident.process_bytes,
                    streamed_layers=count,
                    layers=architecture.layers,
                    streamed_bytes=streamed.process_bytes,
                    host_bytes=streamed.host_bytes,
                    copied_bytes=copied_bytes(changed, architecture, execution),
                )
                break


if __name__ == "__main__":
    main()
