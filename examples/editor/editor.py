"""A small text editor with a diffusion model inside: place the cursor, press Ctrl+Space, and watch the gap denoise.

    python editor.py [FILE] [--at LINE:COL] [--model MODEL.gguf]

The model works on a thread of its own (filler.py). The window looks into its queue 50 times a second and is never kept
waiting; Escape, or any change to the text, ends the work and takes the draft out again.
"""

from __future__ import annotations

import argparse
import functools
import queue
import sys
import tkinter as tk
from collections.abc import Callable
from pathlib import Path
from tkinter import filedialog, font, messagebox

from filler import Draft, Failed, Filled, Filler, Message, Opened, Piece

from pydiffgguf import demo_model_path
from pydiffgguf.text.document import Document

__all__ = ["Editor", "main"]

#: Milliseconds between looks into the queue.
POLL_MS = 20

HINT = "Ctrl+Space fills the gap at the cursor"
SAMPLE = Path(__file__).with_name("sample.txt")
SAMPLE_AT = "1.92"


def _run(command: Callable[[], None], _event: tk.Event[tk.Text]) -> str:
    """A key of the editor's own: the text widget does not see it."""
    command()
    return "break"


class Editor:
    """The window. `job` is the number of the gap that is being filled, None when there is none."""

    def __init__(self, root: tk.Tk, filler: Filler) -> None:
        self.root = root
        self.filler = filler
        self.job: int | None = None
        self.path: Path | None = None
        self._document: Document | None = None
        self._modified_before = False
        self.status = tk.StringVar(value="opening the model")
        self.text = tk.Text(root, wrap="word", undo=True, autoseparators=True, width=72, height=12, padx=10, pady=8)
        self.text.configure(font=font.nametofont("TkFixedFont"), spacing3=3)
        self.text.tag_configure("settled", background="#dcebff")
        self.text.tag_configure("live", background="#ffd9a8", foreground="#8a4b00")
        self.text.tag_configure("filled", background="#d8f5dc")
        tk.Label(root, textvariable=self.status, anchor="w", padx=10, pady=4).pack(side="bottom", fill="x")
        bar = tk.Scrollbar(root, command=self.text.yview)
        bar.pack(side="right", fill="y")
        self.text.configure(yscrollcommand=bar.set)
        self.text.pack(fill="both", expand=True)
        self._bind()
        root.protocol("WM_DELETE_WINDOW", self.quit)
        self._retitle()
        self.text.focus_set()
        self._poll()

    def _bind(self) -> None:
        menu, file, edit = tk.Menu(self.root), tk.Menu(tearoff=False), tk.Menu(tearoff=False)
        file.add_command(label="Open...", accelerator="Ctrl+O", command=self.ask_open)
        file.add_command(label="Save", accelerator="Ctrl+S", command=self.save)
        file.add_command(label="Save as...", command=self.save_as)
        file.add_command(label="Quit", accelerator="Ctrl+Q", command=self.quit)
        edit.add_command(label="Fill the gap", accelerator="Ctrl+Space", command=self.fill)
        edit.add_command(label="Cancel", accelerator="Escape", command=self.cancel)
        edit.add_command(label="Undo", accelerator="Ctrl+Z", command=lambda: self.text.event_generate("<<Undo>>"))
        menu.add_cascade(label="File", menu=file)
        menu.add_cascade(label="Edit", menu=edit)
        self.root.configure(menu=menu)
        for key, command in {
            "<Control-space>": self.fill,
            "<Escape>": self.cancel,
            "<Control-o>": self.ask_open,
            "<Control-s>": self.save,
            "<Control-q>": self.quit,
        }.items():
            self.text.bind(key, functools.partial(_run, command))
        for change in ("<Key>", "<<Cut>>", "<<Paste>>", "<<PasteSelection>>", "<<Undo>>", "<<Redo>>"):
            self.text.bind(change, self._before_change)

    # ------------------------------------------------------------------------------------------------------------ gaps

    def fill(self) -> None:
        """Has the gap at the cursor filled; a second call while one is filled does nothing."""
        if self.job is not None:
            return
        self.text.tag_remove("filled", "1.0", "end")
        self._modified_before = self.text.edit_modified()
        # Drafts come and go between two marks. None of them is a step of undo.
        self.text.configure(undo=False)
        self.text.mark_set("gap", "insert")
        self.text.mark_gravity("gap", "left")
        self.text.mark_set("gap_end", "insert")
        self.job = self.filler.fill(self.text.get("1.0", "insert"), self.text.get("insert", "end-1c"))
        self.status.set("reading (Escape cancels)")

    def cancel(self) -> None:
        """Ends the filling and takes the draft out. The text is as it was."""
        if self.job is None:
            return
        self.filler.cancel()
        self._end()
        self.status.set(f"cancelled. {HINT}")

    def _end(self) -> None:
        self._draw([])
        self.job = None
        self.text.configure(undo=True)
        self.text.edit_modified(self._modified_before)

    def _draw(self, pieces: list[Piece]) -> None:
        """Puts a draft in the place of the one before. The cursor stays behind it unless it was moved away."""
        self.text.delete("gap", "gap_end")
        for piece in pieces:
            self.text.insert("gap_end", piece.text, "live" if piece.live else "settled")
        self.text.see("gap_end")

    def _before_change(self, event: tk.Event[tk.Text]) -> None:
        """The text is about to change under the model: whatever it is writing belongs to another text."""
        by_key = event.type == tk.EventType.KeyPress
        if by_key and (not event.char or event.char == "\x03"):  # a key that moves, or the one that copies
            return
        self.cancel()
        self.text.tag_remove("filled", "1.0", "end")

    def _poll(self) -> None:
        draft = None
        while True:
            try:
                message = self.filler.messages.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, Draft):
                draft = message  # only the last one is drawn: a fast model makes more of them than an eye follows
            else:
                self._show(message)
        if draft is not None and draft.job == self.job:
            self._draw(draft.pieces)
            self.status.set(f"step {draft.step + 1}/{draft.total_steps} (Escape cancels)")
        self.root.after(POLL_MS, self._poll)

    def _show(self, message: Message) -> None:
        if isinstance(message, Opened):
            if self.job is None:
                self.status.set(f"{message.name}. {HINT}")
        elif isinstance(message, Failed) and message.job is None:
            self.cancel()
            self.status.set(f"no model: {message.reason}")
        elif message.job != self.job:
            pass  # of a job that was cancelled
        elif isinstance(message, Failed):
            self._end()
            self.status.set(message.reason)
        elif isinstance(message, Filled) and message.cancelled:
            self.cancel()
        elif isinstance(message, Filled):
            self._end()
            self.text.edit_separator()
            self.text.insert("gap_end", message.text, "filled")
            self.text.edit_separator()
            self.text.see("gap_end")
            self.status.set(f"{message.summary}. {HINT}")

    # ----------------------------------------------------------------------------------------------------------- files

    def contents(self) -> str:
        """The document, without a draft that stands in it."""
        if self.job is None:
            return self.text.get("1.0", "end-1c")
        return self.text.get("1.0", "gap") + self.text.get("gap_end", "end-1c")

    def open(self, path: Path) -> None:
        """Reads a file into the window; where that fails, says why and leaves all as it was."""
        try:
            document = Document(str(path))
        except (OSError, ValueError) as error:
            self.status.set(f"cannot open: {error}")
            return
        self.cancel()
        self.path, self._document = path, document
        self.text.delete("1.0", "end")
        self.text.insert("1.0", document.text)
        self.text.mark_set("insert", "1.0")
        self.text.edit_reset()
        self.text.edit_modified(False)
        self._retitle()

    def save(self) -> None:
        if self.path is None:
            self.save_as()
            return
        try:
            if self._document is None or self._document.path != str(self.path):
                self.path.write_text(self.contents(), encoding="utf-8", newline="")
                self._document = Document(str(self.path))
            else:
                self._document.write(self.contents())  # line ends and byte order mark stay
        except (OSError, ValueError) as error:
            self.status.set(f"cannot save {self.path}: {error}")
            return
        self._modified_before = False
        if self.job is None:
            self.text.edit_modified(False)
        self.status.set(f"saved {self.path}")

    def save_as(self) -> None:
        name = filedialog.asksaveasfilename(parent=self.root)
        if name:
            self.path = Path(name)
            self.save()
            self._retitle()

    def ask_open(self) -> None:
        if self._may_drop_changes():
            name = filedialog.askopenfilename(parent=self.root)
            if name:
                self.open(Path(name))

    def quit(self) -> None:
        if self._may_drop_changes():
            self.filler.close()
            self.root.destroy()

    def _may_drop_changes(self) -> bool:
        modified = self.text.edit_modified() if self.job is None else self._modified_before
        return not modified or messagebox.askyesno("Editor", "Drop the changes that are not saved?", parent=self.root)

    def _retitle(self) -> None:
        self.root.title(f"{self.path.name if self.path else 'untitled'} - pydiffgguf editor")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A text editor whose gaps are filled by a diffusion model.")
    parser.add_argument("file", type=Path, nargs="?", default=None, help="a UTF-8 text (default: a sample)")
    parser.add_argument("--at", metavar="LINE:COL", default=None, help="where the cursor stands, counted from 1")
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="a GGUF file (default: the demo model)")
    options = parser.parse_args(arguments)
    at = SAMPLE_AT if options.file is None else "1.0"
    if options.at is not None:
        line, colon, column = options.at.partition(":")
        if not (line.isdecimal() and (column.isdecimal() or not colon)):
            parser.error(f"--at is {options.at!r}: write LINE or LINE:COL")
        at = f"{line}.{int(column) - 1 if colon else 0}"
    root = tk.Tk()
    editor = Editor(root, Filler(options.model))
    editor.open(options.file or SAMPLE)
    editor.text.mark_set("insert", at)
    editor.text.see("insert")
    root.mainloop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
