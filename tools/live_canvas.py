"""The moving picture in README.md: the canvas of two real runs of the demo model, as the command line draws it.

    python tools/live_canvas.py docs/img/live_canvas.svg

Each frame is a denoise step, rendered by the terminal's own code. Only the pace is made up: the demo model's steps take
milliseconds, a frame stays for a quarter of a second. A viewer that asks for less motion sees the last frame.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.cli.talk import follow
from pydiffgguf.cli.terminal import LiveCanvas, infill_summary, summary

COLUMNS, ROWS = 78, 10
CELL_W, CELL_H, MARGIN, BAR = 9.0, 20.0, 16.0, 34.0
FRAME_S, PAUSE_S = 0.25, 3.0

DOCUMENT = "On Sunday Emma found a"
BEFORE = 'def mul_width_price(width, price):\n    """Multiply width and price."""\n    return '
BEHIND = "\n\nassert mul_width_price(5, 8) == 5 * 8\n"

Line = Sequence[Segment]


@dataclass
class Frame:
    lines: list[Line]
    seconds: float = FRAME_S


@dataclass
class Recorder:
    """An output of the command line that keeps what LiveCanvas would draw."""

    console: Console
    canvas: LiveCanvas
    head: list[Line]
    frames: list[Frame] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        """Events that only the drawing's status knows of."""
        return getattr(self.canvas, name)

    def step(self, event: Any) -> None:
        self.canvas._step = event
        drawn = self.console.render_lines(self.canvas, pad=False)
        if not self.frames or self.frames[-1].lines != [*self.head, *drawn]:
            self.frames.append(Frame([*self.head, *drawn]))

    def block(self, event: Any) -> None:
        pass


def lines(console: Console, text: str, style: str = "") -> list[Line]:
    return list(console.render_lines(Text(text, style), pad=False))


def record() -> list[Frame]:
    """A document written from nothing, then the gap in a program."""
    console = Console(file=io.StringIO(), width=COLUMNS, height=ROWS, force_terminal=True, color_system="truecolor")
    with DiffusionModel(demo_model_path(), n_threads=1) as model:
        head = lines(console, f'$ pydiffgguf generate demo --raw -n 64 --seed 1 -p "{DOCUMENT}"', "bold")
        first = Recorder(console, LiveCanvas(console, model.tokenizer), head)
        result = follow(model.stream(DOCUMENT, raw=True, max_tokens=64, seed=1), first)
        done = [*head, *lines(console, result.text), *lines(console, summary(result), "dim")]
        frames = [Frame(head, 0.8), *first.frames, Frame(done, PAUSE_S)]

        head = lines(console, "$ pydiffgguf infill demo width.py --at 3:12", "bold")
        second = Recorder(console, LiveCanvas(console, model.tokenizer, prefix=BEFORE), head)
        stream = model.stream_infill(BEFORE, BEHIND, max_gap=16, seed=1)
        filled = follow(stream, second, lambda infill: infill.text)
        text = lines(console, BEFORE + filled.text + BEHIND.rstrip())
        done = [*head, *text, *lines(console, infill_summary([filled]), "dim")]
        return [*frames, Frame(head, 0.8), *second.frames, Frame(done, PAUSE_S)]


HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}">
<title>pydiffgguf draws the canvas while the demo model denoises it</title>
<style>
rect {{ fill: #16181d }}
text {{ font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #e6e8eb }}
text {{ white-space: pre }}
.dim {{ fill: #7d8590 }}
.bold {{ font-weight: bold }}
.pinned {{ fill: #56c2d6; font-weight: bold }}
g {{ opacity: 0 }}
g:last-of-type {{ opacity: 1 }}
@media (prefers-reduced-motion: no-preference) {{ g {{ animation: {seconds:g}s step-end infinite }} }}
{rules}
</style>
<rect width="100%" height="100%" rx="8"/>
<circle cx="18" cy="17" r="5.5" fill="#ff5f57"/>
<circle cx="36" cy="17" r="5.5" fill="#febc2e"/>
<circle cx="54" cy="17" r="5.5" fill="#28c840"/>
"""


def svg(frames: Sequence[Frame]) -> str:
    """The frames one above the other; each is visible for its time of the whole."""
    total = sum(frame.seconds for frame in frames)
    rules, groups = [], []
    begin = 0.0
    for i, frame in enumerate(frames):
        end = begin + frame.seconds
        shown = f"{100 * begin / total:.2f}% {{opacity: 1}}"
        hidden = f"{100 * end / total:.2f}% {{opacity: 0}}" if frame is not frames[-1] else ""
        rules.append(f"@keyframes f{i} {{0% {{opacity: 0}} {shown} {hidden}}} #f{i} {{animation-name: f{i}}}")
        groups.append(f'<g id="f{i}">{"".join(row(y, line) for y, line in enumerate(frame.lines[:ROWS]))}</g>\n')
        begin = end
    head = HEAD.format(
        width=COLUMNS * CELL_W + 2 * MARGIN,
        height=ROWS * CELL_H + BAR + MARGIN,
        seconds=total,
        rules="\n".join(rules),
    )
    return head + "".join(groups) + "</svg>\n"


def row(y: int, line: Line) -> str:
    """A line of the terminal; each piece is stretched to its cells, whatever font the viewer has."""
    pieces, column = [], 0
    for segment in line:
        text = segment.text.rstrip("\n")
        body = text.strip(" ")
        if body:
            x = MARGIN + (column + text.index(body)) * CELL_W
            place = f'x="{x:g}" textLength="{len(body) * CELL_W:g}"'
            pieces.append(f'<tspan {place} class="{kind(segment.style)}">{escape(body, quote=False)}</tspan>')
        column += len(text)
    return f'<text y="{BAR + (y + 0.75) * CELL_H:g}">{"".join(pieces)}</text>' if pieces else ""


def kind(style: Style | None) -> str:
    """The class of a piece of text."""
    if style is None:
        return ""
    return "pinned" if style.color else "dim" if style.dim else "bold" if style.bold else ""


def main(path: Path) -> None:
    frames = record()
    path.write_text(svg(frames), encoding="utf-8")
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
