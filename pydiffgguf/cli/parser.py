"""How arguments are read: a parser whose errors are one line with a hint, and the types that values are checked by."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = [
    "Parser",
    "adapter",
    "at_least",
    "flag",
    "flag_of_option",
    "gap",
    "gpu_layers",
    "numbers",
    "position",
    "words",
]

#: Flags of other programs that have no namesake here, and what to write instead.
HINTS = {
    "-m": "the model is the first argument: pydiffgguf COMMAND MODEL",
    "--model": "the model is the first argument: pydiffgguf COMMAND MODEL",
    "-hf": "write the model as hf:OWNER/REPO[:PATTERN]",
    "--hf-repo": "write the model as hf:OWNER/REPO[:PATTERN]",
    "--temp": "the temperature follows a schedule: --t-min and --t-max are its ends",
    "--temperature": "the temperature follows a schedule: --t-min and --t-max are its ends",
    "--top-p": "this sampler draws from the whole distribution; --entropy-bound says how much a step accepts",
    "--top-k": "this sampler draws from the whole distribution; --entropy-bound says how much a step accepts",
    "--min-p": "this sampler draws from the whole distribution; --entropy-bound says how much a step accepts",
    "--repeat-penalty": "this sampler has no repetition penalty",
    "--system-prompt": "pydiffgguf chat takes --system",
    "--num-steps": "--steps",
    "--timeout": "--time-limit",
    "--no-mmap": "give use_mmap=False in Python; the command line always maps the file",
}
#: Words in the place of a command that other programs have.
COMMAND_HINTS = {"run": "chat or generate", "complete": "generate", "version": "--version", "quantize": "convert"}

#: Options of the library whose flag is not their name with dashes.
_FLAGS = {
    "n_ctx": "--ctx",
    "n_threads": "--threads",
    "n_gpu_layers": "--gpu-layers",
    "n_cpu_moe": "--cpu-moe",
    "time_limit_s": "--time-limit",
    "offload_kv": "--no-offload-kv",
    "n": "-n",
}


def flag(name: str) -> str:
    """The flag of an option, from its name in Python."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def flag_of_option(message: str, known: Sequence[str]) -> str | None:
    """A library's message about an option's value in the words of the command line; None if it is about none of the
    `known` flags. The library names options by its own names ("n_ctx is 10: ..."), which nobody typed."""
    match = re.match(r"([a-z][a-z_]*)(?= is |: )", message)
    if match is None:
        return None
    name = flag(match[1])
    return name + message[match.end() :] if name in known else None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong on one line, and what to write instead. Exit code 2.

    `fill`, for the parser of a command, adds its arguments when the command is asked for: those of all commands take as
    long as the rest of a start.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self._fill = self._fill, None
        if fill is not None:
            self.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback"
            )
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if match is not None:
            message = f"no such command: {match[1]!r}{self._nearest_command(match[1])}"
        # argparse names the function that a value is read by: "invalid int value: 'x'".
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"invalid float value: (.*)", r"\1 is not a number", message)
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            command: Parser = getattr(parsed, "command", self)
            command.error(f"unrecognized arguments: {' '.join(rest)}{command._hint(rest[0])}")
        return parsed

    def flags(self) -> list[str]:
        """All flags that this parser knows."""
        return list(self._option_string_actions)

    def _hint(self, word: str) -> str:
        import difflib

        name = word.split("=", 1)[0]
        if name in HINTS:
            return f": {HINTS[name]}"
        close = difflib.get_close_matches(name, self.flags(), n=1) if name.startswith("--") else []
        return f"; did you mean {close[0]}?" if close else ""

    def _nearest_command(self, word: str) -> str:
        import difflib

        if word in COMMAND_HINTS:
            return f"; did you mean {COMMAND_HINTS[word]}?"
        commands: list[str] = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                commands = list(action.choices)
        close = difflib.get_close_matches(word, commands, n=1)
        return f"; did you mean {close[0]}?" if close else f": choose from {', '.join(commands)}"


# ---------------------------------------------------------------------------------------------------------- values


def gpu_layers(text: str) -> int | str:
    """``auto``, or a number; ``all`` and llama.cpp's -1 are more layers than any model has."""
    if text in ("all", "-1"):
        return 2**31 - 1
    if text != "auto" and not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of layers, auto or all")
    return "auto" if text == "auto" else int(text)


def words(text: str) -> list[str]:
    """Words with commas between them."""
    return [word.strip() for word in text.split(",")]


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,1") from None


def adapter(text: str) -> tuple[str, float]:
    """(path, scale) of PATH[:SCALE]: the part behind the last colon is a scale if it reads as a number, and the
    whole is no path."""
    path, colon, tail = text.rpartition(":")
    if colon and path and not os.path.exists(text):
        try:
            return path, float(tail)
        except ValueError:
            pass
    return text, 1.0


def at_least(least: int) -> Callable[[str], int]:
    """A whole number with a lower bound."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least {least}")
        return int(text)

    return number


def gap(text: str) -> int | str:
    """The length of a gap."""
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, at least 1, or auto")
    return "auto" if text == "auto" else int(text)


def position(text: str) -> Any:
    """A Position of a Document."""
    from pydiffgguf.text.document import Position

    try:
        return Position.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
