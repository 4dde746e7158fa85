"""The command ``chat``: a conversation on a terminal, or a turn a line from a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydiffgguf.cli.talk import aside, follow, make_output
from pydiffgguf.cli.terminal import Output, summary
from pydiffgguf.engine.conversation import CACHE
from pydiffgguf.errors import ContextOverflowError, DiffGGUFError

if TYPE_CHECKING:
    from pydiffgguf.generate import Generation
    from pydiffgguf.model import DiffusionModel

__all__ = ["Chat"]

HELP = '''\
/retry        answer the last message again
/undo         take back the last message and its answer
/system TEXT  set the system message; without TEXT, show it
/clear        forget the conversation, keep the system message
/save FILE    write the conversation as JSON, and the model's cache of it to FILE.cache
/load FILE    go on with a conversation that was saved; with its cache it is not read again
/help         this
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer
A message of several lines can be pasted, or typed between two lines of """'''

FENCE = '"""'


class Chat:
    """A conversation on stdin and stdout. Without a terminal every line of stdin is a turn, and the first error ends
    it; on a terminal an error ends only its turn.

    Args:
        system: the system turn, or None.
        options: keyword arguments of DiffusionModel.chat.
    """

    def __init__(
        self, model: DiffusionModel, system: str | None, *, thinking: bool, live: bool, options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._thinking = thinking
        self._live = live
        self._options = options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._interactive = sys.stdin.isatty()

    def run(self) -> int:
        """Talks until /exit or the end of input. On a terminal, Ctrl-C at the prompt drops the line that was begun."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # input() then has line editing and history

                # Python turns it off; with it, pasted lines are one message and not a turn each.
                readline.parse_and_bind("set enable-bracketed-paste on")
            aside("/help lists the commands, /exit or Ctrl-D leaves")
        while True:
            try:
                text = self._read()
            except EOFError:
                if self._interactive:
                    print()
                return 0
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if text == "/exit":
                return 0
            name, _, argument = text.partition(" ")
            if text.startswith("/") and "\n" not in text and name[1:].isalpha():
                self._command(name, argument.strip())
            elif text:
                self._turn(text)

    def _read(self) -> str:
        """The next message: a line, or what comes between two lines that are a fence."""
        if not self._interactive:
            return input().strip()
        line = input("> ").strip()
        if not line.startswith(FENCE):
            return line
        lines = [line.removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(input(". "))
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        return "\n".join(lines).strip("\n")

    def _command(self, name: str, argument: str) -> None:
        if argument and name not in ("/system", "/save", "/load"):
            print(f"{name} takes nothing behind it")
        elif name == "/clear":
            self._turns = []
            aside("the conversation is forgotten")
        elif name == "/help":
            print(HELP)
        elif name == "/undo":
            aside("taken back" if self._take_back() is not None else "there is nothing to take back")
        elif name == "/retry":
            if (text := self._take_back()) is None:
                aside("there is nothing to answer again")
            else:
                self._turn(text)
        elif name == "/system":
            if argument:
                self._system = argument
            aside(f"system: {self._system}" if self._system else "there is no system message")
        elif name in ("/save", "/load"):
            self._file(name, argument)
        else:
            print(f"no such command: {name}\n{HELP}")

    def _file(self, name: str, path: str) -> None:
        if not path:
            print(f"{name} needs a file's name")
            return
        try:
            if name == "/save":
                cache = path + CACHE
                for file in (path, cache):  # nobody's file is overwritten
                    if os.path.lexists(file):
                        raise FileExistsError(f"{file}: File exists")
                cached = self._model.save_conversation(path, self._messages(), thinking=self._thinking)
                read = f", what the model has read of them in {cache}" if cached else ""
                aside(f"{len(self._turns)} messages are in {path}{read}")
            else:
                self._load(self._model.load_conversation(path, thinking=self._thinking))
                aside(f"{len(self._turns)} messages from {path}")
        except (DiffGGUFError, OSError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}")

    def _load(self, messages: list[dict[str, Any]]) -> None:
        if not all(
            message.get("role") in ("system", "user", "assistant") and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise ValueError("it holds tool calls, or messages that are no plain text: `chat` has no tools")
        systems = [message["content"] for message in messages if message["role"] == "system"]
        self._system = systems[0] if systems else None
        self._turns = [message for message in messages if message["role"] != "system"]

    def _messages(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def _take_back(self) -> str | None:
        """Drops the last message and its answer; returns the message, None if there is none."""
        while self._turns:
            turn = self._turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def _turn(self, text: str) -> None:
        output = _Recording(make_output(self._model, self._live))
        turn = {"role": "user", "content": text}
        try:
            stream = self._model.stream_chat([*self._messages(), turn], thinking=self._thinking, **self._options)
            result = follow(stream, output)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            aside("stopped")
        except (DiffGGUFError, OSError, ValueError) as error:
            if not self._interactive:
                raise
            print(f"error: {' '.join(str(error).split())}")
            if isinstance(error, ContextOverflowError) and self._turns:
                print("The conversation is full: /undo takes back a turn, /clear starts over, --ctx N makes room.")
            return
        else:
            if self._interactive:
                aside(f"{summary(result)}; {self._used(result)}")
            output.text = result.text
        # A stopped answer stays in the conversation as far as it was finished; without any, the turn did not happen.
        if output.text:
            self._turns += [turn, {"role": "assistant", "content": output.text}]

    def _used(self, result: Generation) -> str:
        return f"context {result.stats.prompt_tokens + len(result.tokens)} of {self._model.n_ctx}"


class _Recording:
    """An output that also remembers the text."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.text = ""

    def __enter__(self) -> _Recording:
        self._output.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._output.__exit__(*details)

    def prefill(self, event: Any) -> None:
        self._output.prefill(event)

    def step(self, event: Any) -> None:
        self._output.step(event)

    def block(self, event: Any) -> None:
        self.text += event.text
        self._output.block(event)
