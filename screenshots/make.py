"""Draws the pictures of README and docs: ``make screenshots``.

The runs are real ones of ``qlora-tui demo`` (``bench/support/recordings``), as their trainer wrote them, with
empty files in place of the weights. They are copied into a separate home folder and shown by the app itself;
nothing is drawn by hand. Each is named for the time at which it is shown to have started. The data are those
of these runs, through the demo's tokenizer, so the demo's model must have been fetched. Of the larger model
there are the configuration, the license, and weights that are a header without contents. The chat needs a
trained adapter: that of the newest demo on this machine (``make demo`` trains one).
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.runs.directory import RunDir
from screenshots.motion import Frame, animate

if TYPE_CHECKING:
    from textual.pilot import Pilot

HERE = Path(__file__).parent
HOME = Path(tempfile.gettempdir()) / "qlora-tui-pictures"
"""Always the same folder, since some screens show where a model is."""
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
"""One of them is on each system."""
GPU_GIB = 12.0
"""The memory that estimates are for, as there may be no GPU: here NF4 fits and fp16 does not."""
WATCHED_SHARE = 0.87
"""How much of the recorded run the picture of the live screen shows."""
QWEN = HERE.parent / "tests" / "configs" / "Qwen__Qwen2.5-7B.json"
_PATIENCE_S = 90.0
_ANSWER_PATIENCE_S = 300.0
"""Loading the model and two answers of a CPU."""


@dataclass(frozen=True)
class Picture:
    """One screenshot: a screen, a size, and what is done before it is taken."""

    mode: str
    size: tuple[int, int] = (120, 40)
    shows: str = ""
    """Text to wait for."""
    model: str = "Qwen2.5-7B"
    """The recipe's."""
    prompt: str = ""
    """Typed into the chat and answered."""

    @property
    def name(self) -> str:
        """Its file, without the suffix."""
        return f"{self.mode}-{self.size[0]}x{self.size[1]}"


SMALL = "SmolLM2-135M-Instruct"
"""The demo's model."""
PICTURES = (
    Picture("home", shows="▸ Enter"),
    Picture("models", shows="Good first models"),
    Picture("data", shows="too few to learn much", model=SMALL),
    Picture("memory", shows="traced"),
    Picture("lora", shows="q_proj"),
    Picture("train", shows="validation"),
    Picture("train", size=(80, 24), shows="step"),
)
RUNS = Picture("runs", shows="2 checkpoints")
_LOOP_SIZE = (100, 30)
CHAT = Picture("chat", _LOOP_SIZE, shows="demo", model=SMALL, prompt="What is the capital of France?")
BEFORE_THE_RUN = (
    (Picture("models", _LOOP_SIZE, shows=SMALL, model=SMALL), 1.8),
    (Picture("data", _LOOP_SIZE, shows="99% ≤", model=SMALL), 2.6),
    (Picture("memory", _LOOP_SIZE, shows="Change", model=SMALL), 2.4),
    (Picture("lora", _LOOP_SIZE, shows="q_proj", model=SMALL), 1.6),
)
"""The first frames of the moving picture, and how many seconds each is shown."""
WATCHED_STEPS = (1, 4, 8, 14, 20, 26, 32, 38, 44, 50, 56, 62, 70)
WATCHED_S, ENDED_S, CHAT_S = 0.4, 2.2, 4.2


def main() -> int:
    """Draw every picture into this folder."""
    from qlora_tui.demo.demo_model import ensure_model

    model = ensure_model(lambda words: print(words, file=sys.stderr))
    demo = newest_demo()
    with private_home(model):
        for picture in PICTURES:
            lay_out_run(WATCHED_SHARE)  # a heartbeat of a minute ago would be too old
            save(f"{picture.name}.svg", asyncio.run(draw(picture)))
        save("run-card.svg", recorded_card())
        lay_out_run(WATCHED_SHARE)
        lay_out_earlier_runs()
        save(f"{RUNS.name}.svg", asyncio.run(draw(RUNS)))
        frames = moving_frames()
        if demo is None:
            print("No picture of the chat: `make demo` trains the adapter that it needs.", file=sys.stderr)
        else:
            clear_runs()
            copy_demo(demo)
            frames.append(Frame(asyncio.run(draw(CHAT)), CHAT_S))
            save(f"{CHAT.name}.svg", frames[-1].svg)
        save("loop.svg", animate(frames, still=len(BEFORE_THE_RUN) + len(WATCHED_STEPS) - 1))
    return 0


def save(name: str, svg: str) -> None:
    """Write one file and name it."""
    (HERE / name).write_text(svg)
    print(name)


def recorded_card() -> str:
    """The card of the recorded run."""
    from qlora_tui.runs.view import RunView
    from qlora_tui.tui.render.run_card import card_svg, read_card
    from screenshots.recorded_runs import recorded_run

    clear_runs()
    view = RunView(recorded_run())
    view.refresh()
    return card_svg(view, read_card(view))


def moving_frames() -> list[Frame]:
    """From the choice of a model to the end of the recorded run."""
    from screenshots.recorded_runs import NAME

    clear_runs()
    frames = [Frame(asyncio.run(draw(picture)), seconds) for picture, seconds in BEFORE_THE_RUN]
    live = Picture("train", _LOOP_SIZE, shows="step", model=SMALL)
    for step in WATCHED_STEPS:
        lay_out_run(step)
        frames.append(Frame(asyncio.run(draw(live)), WATCHED_S))
    clear_runs()
    show_ended_run(NAME, time.time())
    frames.append(Frame(asyncio.run(draw(replace(live, mode="runs", shows="finished"))), ENDED_S))
    return frames


@contextmanager
def private_home(model: Path) -> Iterator[None]:
    """Set the app's folders to temporary ones, which hold the demo's model and a larger one."""
    shutil.rmtree(HOME, ignore_errors=True)
    try:
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = str(HOME / kind.lower())
        os.environ["TEXTUAL_COLOR_SYSTEM"] = "truecolor"  # read by Textual when it is imported
        os.environ["HF_HOME"] = str(HOME / "huggingface")
        lay_out_larger_model(HOME / "models" / "Qwen2.5-7B")
        (HOME / "models" / SMALL).symlink_to(model)
        yield
    finally:
        shutil.rmtree(HOME, ignore_errors=True)


def lay_out_larger_model(folder: Path) -> None:
    """Write its configuration, its license, and a sparse file of weights with their names and shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    shutil.copy(QWEN, folder / "config.json")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def newest_demo() -> Path | None:
    """The folder of the newest demo on this machine that ended with an adapter."""
    from qlora_tui.runs.directory import all_runs
    from qlora_tui.runs.status import read_status

    for run in all_runs():
        ended = read_status(run).state in ("finished", "stopped")
        if ended and run.adapter_dir.exists() and run.recipe().name == "demo":
            return run.path
    return None


def copy_demo(demo: Path) -> None:
    """Put the demo's run in place."""
    from qlora_tui import paths

    shutil.copytree(demo, paths.runs_dir() / demo.name, symlinks=True)


def clear_runs() -> None:
    """Remove every run of the private home."""
    from qlora_tui import paths

    shutil.rmtree(paths.runs_dir())


def lay_out_run(wait_until: float) -> None:
    """Put the recorded run in place as it was at a step, or at a share of its steps, still in training."""
    from qlora_tui.runs.process import process_identity
    from screenshots.recorded_runs import STEPS, recorded_until

    clear_runs()
    run, at = recorded_until(
        round(STEPS * wait_until if wait_until < 1 else wait_until), process=process_identity()
    )
    # The run is shown as if it were now: its clock is moved, nothing else.
    move_clock(run, time.time() - at)


def lay_out_earlier_runs() -> None:
    """Put the other recorded runs in place, as if they had ended some hours ago."""
    from screenshots.recorded_runs import LONGER, NO_MEMORY, NOT_A_NUMBER, SHORTER

    for hours, name in enumerate((LONGER, SHORTER, NOT_A_NUMBER, NO_MEMORY), 1):
        show_ended_run(name, time.time() - hours * 3600)


def show_ended_run(name: str, ended: float) -> None:
    """Put a whole recorded run in place, as if it had ended at that Unix time."""
    from qlora_tui.runs.status import read_status
    from screenshots.recorded_runs import recorded_run

    run = recorded_run(name)
    by = ended - read_status(run).at
    move_clock(run, by)


def move_clock(run: RunDir, by: float) -> None:
    """Show a run ``by`` seconds later, under the name that it would have then, with its checkpoints."""
    from screenshots.recorded_runs import lay_out_saved

    for path in (run.events_path, run.telemetry_path, run.status_path):
        shift_clock(path, by)
    began = json.loads(run.events_path.read_text().partition("\n")[0])["at"]
    os.utime(run.recipe_path, (began, began))
    moved = RunDir(run.path.with_name(time.strftime("smollm2-135m-demo-%Y%m%d-%H%M", time.localtime(began))))
    run.path.rename(moved.path)
    lay_out_saved(moved)


def shift_clock(path: Path, by: float) -> None:
    """Add ``by`` seconds to every line's ``at``."""
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        entry["at"] += by
        if isinstance(entry.get("gpu"), dict):
            entry["gpu"]["at"] += by
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")


async def draw(picture: Picture) -> str:
    """The SVG of one picture."""
    from qlora_tui.recipe.layering import build_recipe
    from qlora_tui.settings import Settings
    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.screens.chat.screen import ChatScreen
    from screenshots.recorded_runs import CONVERSATIONS

    app = QloraApp(Settings(model_folders=(str(HOME / "models"),), gpu_memory_gib=GPU_GIB))
    model = HOME / "models" / picture.model
    app.workbench.replace(build_recipe(preset="balanced", model=str(model), data=[str(CONVERSATIONS)]))
    async with app.run_test(size=picture.size) as pilot:
        if picture.mode != "home":
            await app.switch_mode(picture.mode)
        await wait_until(pilot, lambda: picture.shows in plain(app.export_screenshot()), picture)
        if picture.prompt:
            await pilot.press(
                "i", *("space" if c == " " else "question_mark" if c == "?" else c for c in picture.prompt)
            )
            await pilot.press("enter")
            await pilot.pause(1.5)
            chat = app.screen
            assert isinstance(chat, ChatScreen)
            await wait_until(pilot, lambda: not chat.conversation.busy, picture, _ANSWER_PATIENCE_S)
        await pilot.pause(1.5)
        return with_local_fonts(app.export_screenshot(title="qlora-tui"))


def with_local_fonts(svg: str) -> str:
    """The picture without Textual's web font, which a browser does not load for an image in a page.

    Each text says how long it is, so any font that is one cell wide fits.
    """
    svg = re.sub(r"@font-face \{[^}]*\}\s*", "", svg)
    svg = re.sub(r"\s*font-variant-east-asian: full-width;", "", svg)
    svg = svg.replace("font-family: arial", "font-family: arial, sans-serif")
    return svg.replace("font-family: Fira Code, monospace", f"font-family: {FONTS}")


async def wait_until(
    pilot: Pilot[None], what: Callable[[], bool], picture: Picture, patience_s: float = _PATIENCE_S
) -> None:
    """Let the app run until ``what`` is true."""
    deadline = time.monotonic() + patience_s
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{picture.name}: {picture.shows!r} did not appear")
        await pilot.pause(0.2)


def plain(svg: str) -> str:
    """The text of a picture."""
    return html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).replace("\xa0", " ")


if __name__ == "__main__":
    sys.exit(main())
