"""The pictures in docs/editor: the window before, during and after a filling.

    xvfb-run -s "-screen 0 613x355x24" python examples/editor/screenshots.py docs/editor

Needs ImageMagick's `import`.
"""

from __future__ import annotations

import subprocess
import sys
import time
import tkinter as tk
from collections.abc import Callable
from pathlib import Path

from editor import SAMPLE, SAMPLE_AT, Editor
from filler import Filler

from pydiffgguf import demo_model_path


def main(folder: Path) -> None:
    root = tk.Tk()
    editor = Editor(root, Filler(demo_model_path()))
    editor.open(SAMPLE)
    editor.text.mark_set("insert", SAMPLE_AT)
    editor.text.focus_force()

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            root.update()
            time.sleep(0.001)

    def picture(name: str) -> None:
        root.update()
        colours = ["-strip", "-depth", "8", "+dither", "-colors", "64"]
        command = ["import", "-window", "root", *colours, str(folder / f"{name}.png")]
        subprocess.run(command, check=True)

    until(lambda: "Ctrl+Space" in editor.status.get())
    picture("before")
    editor.text.event_generate("<Control-space>")
    until(lambda: "step 4/" in editor.status.get() and bool(editor.text.tag_ranges("live")))
    picture("during")
    until(lambda: editor.job is None)
    picture("after")
    editor.filler.close()
    root.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
