"""Renders a chat template that a stranger wrote, within bounds.

A GGUF carries its chat template as Jinja source. jinja2's sandbox keeps it from Python's internals, and limits `range`;
it does not limit work. Each of these, tried with jinja2 3.1.6, takes minutes or all memory and is legal there: nested
loops, macros that call themselves twice, ``'a' * 10**10``, ``10 ** (10 ** 10)``, ``'%999999999d' % 1``, a list that
holds its predecessor twice, forty times over, printed, and ``'x'|center(10**9)``. Much of it runs while compiling
already, where constants are folded.

So the environment here counts work: every turn of a loop, every macro call, and every character and list entry that an
operator, filter, method or output makes is paid for out of one allowance before it is made. What cannot be priced in
advance (``%`` and ``format`` with a width of three digits, filters that pad) is left out; chat templates have no use
for it.

minijinja, an engine in Rust that counts instructions, was tried in its place (3.1.0, docs/FILES.md has the figures): it
renders the same, but its fuel does not count memory, and long expressions overflow its stack, which ends the process.
"""

from __future__ import annotations

import functools
import json
import re
import string
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS as DEFAULT_TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pydiffgguf._text import one_line
from pydiffgguf.errors import ModelFormatError

__all__ = ["ChatTemplate", "TemplateRefusal"]

#: Longest template source, in characters. The released one has 17,500.
#: Compiling takes up to 3 s for 100,000.
MAX_SOURCE = 100_000
#: The allowance of one rendering: this many units, and this many for each character handed in. A unit is a character or
#: an eighth of a list entry; a turn of a loop costs four, a call twenty. A template like the released one was measured
#: to take six units for a character of long messages, and twenty of a thousand short ones.
BASE_UNITS = 8_000_000
UNITS_PER_CHARACTER = 50
TURN = 4
CALL = 20
ENTRY = 8
#: A second bound, for work that is only counted roughly (comparisons, searches): the thread's own time, so that a busy
#: machine changes nothing. The clock is read once in this many units or payments, since reading it costs as much as a
#: turn; the work of one payment takes at most some milliseconds (``'a' in range(99999)``).
#: Templates that look ahead from each message take time for every pair of messages (1.9 s for a thousand, in
#: transformers too), so pairs add to it.
MAX_SECONDS = 1.5
SECONDS_PER_PAIR = 4e-6
MAX_SECONDS_OF_PAIRS = 10.0
CLOCK_UNITS = 20_000
CLOCK_PAYMENTS = 64
#: Longest text that a search looks for and longest set of characters to strip: both are quadratic at worst.
MAX_NEEDLE = 1_000
#: What a placeholder in a format string may take, so that none pads by more than two digits say; and the most that one
#: can make of a number (``%.99f`` of 1e308).
PERCENT = re.compile(r"%(?:%|(?:\(\w+\))?[-#0 +]{0,5}\d{0,2}(?:\.\d{0,2})?[diouxXeEfFgGcrsa])")
BRACES = re.compile(r"[^{}]{0,2}[-+ #]{0,3}\d{0,2},?(?:\.\d{0,2})?[a-zA-Z%]?")
PLACEHOLDER = 500
#: Most digits that ``round`` keeps or drops.
MAX_ROUND = 20

# Tables of words, packed by hand: formatted, each has as many lines as words.
# fmt: off
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "truncate",
    "unique", "upper", "wordcount",
)
#: Filters that hand on what they were given, or look at its length only.
CHEAP_FILTERS = ("count", "d", "default", "first", "last", "length")
#: Filters that go through all of what they were given; a lazy sequence becomes a list before it is weighed.
LIST_FILTERS = ("groupby", "join", "list", "max", "min", "reverse", "sort", "sum", "unique")
#: Filters that go through what they were given as their result is gone through, and may hand nothing on.
LAZY_FILTERS = ("map", "reject", "rejectattr", "select", "selectattr")
STRING_METHODS = (
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)
# fmt: on
METHODS: dict[type, tuple[str, ...]] = {
    str: STRING_METHODS,
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
}


class TemplateRefusal(Exception):
    """The template itself refused the messages, by calling ``raise_exception``."""


class _OutOfUnits(Exception):
    pass


class ChatTemplate:
    """A compiled template; renders are serialized.

    Raises:
        ModelFormatError: the source is too long, does not compile, or compiling takes too much work.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise ModelFormatError(f"tokenizer.chat_template: {len(source)} characters, at most {MAX_SOURCE} are read")
        self._lock = threading.Lock()
        self._environment = _Environment()
        try:
            self._environment.allow(len(source))
            tree = _Accounting(self._environment).visit(self._environment.parse(source))
            code = self._environment.compile(tree)
            self._template = Template.from_code(self._environment, code, self._environment.make_globals(None))
        except Exception as error:  # jinja2's own, and SyntaxError or RecursionError from the code it generates
            raise ModelFormatError(f"tokenizer.chat_template does not compile: {_told(error)}") from error

    def render(self, variables: Mapping[str, Any], size: int) -> str:
        """The rendered text.

        Args:
            variables: what the template can name; plain str, int, bool, None, list and dict.
            size: characters in `variables`; the allowance grows with it.

        Raises:
            TemplateRefusal: the template called raise_exception.
            ModelFormatError: any other failure, or too much work.
        """
        with self._lock:
            try:
                self._environment.allow(size, len(variables.get("messages", ())))
                return self._template.render(variables)
            except TemplateRefusal:
                raise
            except Exception as error:  # whatever a stranger's template can do wrong
                raise ModelFormatError(f"tokenizer.chat_template fails: {_told(error)}") from error


def _told(error: Exception) -> str:
    if isinstance(error, _OutOfUnits):
        return "it takes too much work"
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    text = one_line(error)
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if isinstance(error, TemplateError) and line else text


class _Namespace(Namespace):
    """Templates write to its attributes; none may look like Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]", form):  # glibc pads: %999999999d
        raise SecurityError("strftime_now takes plain directives only")
    return datetime.now().strftime(form)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``, by which training marks what the model writes: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with every operation priced."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Constants are not folded, so that nothing runs before render() has set its allowance; `finalize` wants the
        # context for the same reason.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._output,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._units = 0
        self._payments = 0
        self._next_look = 0
        self._deadline = 0.0
        self.filters = {name: self._filter(name) for name in FILTERS}
        self.filters["tojson"] = self._tojson
        self.filters["__weigh"] = self._weigh
        self.tests = {name: self._test(name) for name in DEFAULT_TESTS}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = tuple(self.globals.values())

    def wrap_str_format(self, value: Any) -> None:
        """jinja2 puts a function in the place of ``str.format``; here `call` checks its text instead."""

    # What is paid

    def allow(self, size: int, messages: int = 0) -> None:
        """Sets the allowance for one rendering of `size` characters in this many messages."""
        self._units = BASE_UNITS + UNITS_PER_CHARACTER * size
        self._deadline = time.thread_time() + MAX_SECONDS + min(messages**2 * SECONDS_PER_PAIR, MAX_SECONDS_OF_PAIRS)
        self._next_look = self._units

    def pay(self, units: int) -> None:
        self._units -= units
        self._payments += 1
        if self._units < self._next_look or self._payments >= CLOCK_PAYMENTS:
            if self._units < 0 or time.thread_time() > self._deadline:
                raise _OutOfUnits
            self._next_look = self._units - CLOCK_UNITS
            self._payments = 0

    @property
    def turn(self) -> None:
        """Pays for one turn of a loop or one macro call. A property, because jinja2's syntax tree can name an
        attribute of the environment as a statement, and offers no cheaper hook."""
        self.pay(TURN)

    def _paid(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.pay(TURN)
            yield value

    def _weigh(self, value: Any) -> Any:
        """Pays for a value with all that it holds, counted as often as it would be printed; returns it. Numbers pay for
        their digits."""
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.pay(len(item))
            elif isinstance(item, (list, tuple)):
                self.pay(ENTRY * (1 + len(item)))
                stack.extend(item)
            elif isinstance(item, dict):
                self.pay(ENTRY * (1 + 2 * len(item)))
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, int):
                self.pay(1 + item.bit_length() // 3)
        return value

    # Where it is paid

    @pass_context
    def _output(self, context: Context, value: Any) -> str:
        return str(self._weigh(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, (str, list, tuple)) and isinstance(other, int):
                self.pay(max(other, 0) * (len(one) if isinstance(one, str) else ENTRY * len(one)))
        if operator == "%" and isinstance(left, str):
            self._weigh(right)
            self._price_percent(left)
        if isinstance(left, int) and isinstance(right, int):
            self.pay(left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length())
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.pay(len(left) + len(right))
            return left + right
        return self._weigh(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja2's own signature: the names must not meet a template's keyword arguments
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and owner is not None:
            name = __obj.__name__
            if isinstance(owner, LoopContext) and name in ("cycle", "changed"):
                pass
            elif name not in METHODS.get(type(owner), ()):
                raise SecurityError(f"{type(owner).__name__}.{name} is not offered")
            elif isinstance(owner, str):
                args = __self._price_string_method(owner, name, args)
        elif not isinstance(__obj, (Macro, LoopContext, Undefined)) and __obj not in __self._functions:
            raise SecurityError("a call of something that is no function")
        __self.pay(CALL)
        return __self._weigh(super().call(__context, __obj, *args, **kwargs))

    def _price_string_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.pay(len(text) // ENTRY)
        if name == "join":
            items = [list(args[0])] if args else []
            self._weigh(items)
            self.pay(len(text) * len(items[0]) if items else 0)
            return (*items, *args[1:])
        if name == "format":
            self._price_braces(text)
        for argument in args:
            if name not in ("replace", "format") and isinstance(argument, str) and len(argument) > MAX_NEEDLE:
                raise _OutOfUnits
        if name == "replace" and len(args) > 1:
            self._price_replace(text, args[0], args[1])
        return args

    def _price_percent(self, text: str) -> None:
        rest = PERCENT.sub("", text)
        if "%" in rest:
            raise SecurityError("formatting takes widths of two digits at most")
        self.pay(text.count("%") * PLACEHOLDER)

    def _price_braces(self, text: str) -> None:
        for _, field, spec, _conversion in string.Formatter().parse(text):
            if field is not None:
                if not re.fullmatch(r"\w*", field) or not BRACES.fullmatch(spec or ""):
                    raise SecurityError("str.format takes names and widths of two digits at most")
                self.pay(PLACEHOLDER)

    def _price_replace(self, text: Any, old: Any, new: Any) -> None:
        if len(str(old)) > MAX_NEEDLE:
            raise _OutOfUnits
        self.pay(str(text).count(str(old)) * len(str(new)))

    def _filter(self, name: str) -> Callable[..., Any]:
        """The built-in filter of that name, paying for what goes in and for what comes out."""
        builtin = cast("Callable[..., Any]", DEFAULT_FILTERS[name])

        @functools.wraps(builtin)
        def paying(*args: Any, **kwargs: Any) -> Any:
            index = 1 if hasattr(builtin, "jinja_pass_arg") else 0  # a context or environment comes first
            value, rest = args[index], args[index + 1 :]
            self.pay(TURN)
            if name in CHEAP_FILTERS:
                return builtin(*args, **kwargs)
            if name in LIST_FILTERS and not isinstance(value, (str, Undefined)):
                value = list(value)
                args = (*args[:index], value, *rest)
            self._weigh(value)
            if name in LAZY_FILTERS and isinstance(value, Iterable) and not isinstance(value, Undefined):
                args = (*args[:index], self._paid(value), *rest)
            self._weigh((rest, kwargs))
            self._price_filter(name, value, rest, kwargs)
            return self._weigh(builtin(*args, **kwargs))

        return paying

    def _price_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else None
        if name == "join":
            glue = kwargs.get("d", first)
            self.pay(len(value) * len(glue) if isinstance(glue, str) else 0)
        elif name == "replace":
            self._price_replace(value, kwargs.get("old", first), kwargs.get("new", args[1] if len(args) > 1 else ""))
        elif name == "indent":
            width = kwargs.get("width", first if first is not None else 4)
            self.pay(len(str(value).splitlines()) * (len(width) if isinstance(width, str) else max(int(width), 0)))
        elif name == "format":
            self._price_percent(str(value))
        elif name == "round" and abs(int(kwargs.get("precision", first or 0))) > MAX_ROUND:
            raise _OutOfUnits
        elif name == "sum":
            if args or kwargs:
                raise SecurityError("sum takes no options")
            digits = max((n.bit_length() for n in value if isinstance(n, int)), default=0)
            self.pay(len(value) * (1 + digits // 8))
        elif name == "trim" and len(kwargs.get("chars", first) or "") > MAX_NEEDLE:
            raise _OutOfUnits
        elif name == "int" and isinstance(value, str) and len(value) > MAX_NEEDLE:
            raise _OutOfUnits  # quadratic before Python 3.10.7

    def _test(self, name: str) -> Callable[..., Any]:
        builtin = cast("Callable[..., Any]", DEFAULT_TESTS[name])

        @functools.wraps(builtin)
        def paying(*args: Any, **kwargs: Any) -> Any:
            for argument in args:
                self.pay(TURN + (len(argument) // ENTRY if isinstance(argument, (str, list)) else 0))
            return builtin(*args, **kwargs)

        return paying

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers' templates expect it: jinja2's own filter escapes for HTML."""
        if indent is not None and indent > 16:
            raise _OutOfUnits
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        parts = []
        for part in encoder.iterencode(value):
            self.pay(len(part))
            parts.append(part)
        return "".join(parts)


class _Accounting(NodeTransformer):
    """Writes the payments into a template's syntax tree that the environment has no hook for."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def _place(self, node: nodes.Node, lineno: int) -> Any:
        return node.set_lineno(lineno).set_environment(self._environment)

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, self._place(nodes.ExprStmt(nodes.EnvironmentAttribute("turn")), node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        # Plain text goes out through `finalize` only when it is an expression.
        self.generic_visit(node)
        node.nodes = [
            self._place(nodes.Const(part.data), part.lineno) if isinstance(part, nodes.TemplateData) else part
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        # a ~ b is str(a) + str(b), and + is priced
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        return self._place(functools.reduce(nodes.Add, texts), node.lineno)

    def _container(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(isinstance(n, nodes.Const) for n in node.iter_child_nodes()):
            return node
        return self._place(nodes.Filter(node, "__weigh", [], [], None, None), node.lineno)

    visit_List = visit_Tuple = visit_Dict = _container
