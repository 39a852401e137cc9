"""Chat templates from outside: Jinja that came with a checkpoint, rendered where it can do no harm.

A template is a program. It runs in Jinja's immutable sandbox, without files to include, with the filters and methods
that published templates use, and within a budget: every turn of a loop, every call and every character it makes
counts. Nothing in it depends on the day or the machine, so the same dialogue gives the same text.

``{% generation %} … {% endgeneration %}`` marks the assistant's words, as in Transformers.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE, MAX_TEXT = 2**20, 2**22  # characters: of a template, of anything that it makes
BUDGET = 500_000  # turns of loops, calls, and 1,024 characters each, of one rendering
_FILTERS = (
    "abs", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_METHODS = frozenset(
    (
        "capitalize", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isdigit", "islower",
        "isnumeric", "isspace", "isupper", "items", "join", "keys", "lower", "lstrip", "partition", "removeprefix",
        "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "swapcase", "title", "upper", "values",
    )
)  # fmt: skip
# Two code points that are no characters, so no text is harmed by losing them.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_UNMARKED = str.maketrans({_BEGIN: "\ufffd", _END: "\ufffd"})
_left: ContextVar[int] = ContextVar("budget of a template")
_FAULTS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


class ReceivedTemplate:
    """A chat template.

    Args:
        source: the template.
        name: whose it is, for messages.

    Raises:
        ValueError: it is too large, or no template that may run.
    """

    def __init__(self, source: str, name: str) -> None:
        self.name = name
        if len(source) > MAX_TEMPLATE:
            raise ValueError(
                f"the chat template of {name} has {len(source):,} characters, expected at most {MAX_TEMPLATE:,}; use "
                "the template of another source."
            )
        self.marks_answers = "endgeneration" in source
        try:
            self._template = _Sandbox().from_string(source)
        except _FAULTS as error:
            where = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(
                f"the chat template of {name} cannot be read: {_said(error)}{where}; restore it."
            ) from None

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, **tokens: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a dialogue, and where in it the template marks the assistant's words.

        Args:
            messages: turns with ``role`` and ``content``.
            add_generation_prompt: end with what stands before an answer.
            tokens: ``bos_token``, ``eos_token`` and their like.

        Raises:
            ValueError: the template fails, refuses the dialogue, or does more than it may.
        """
        used = _left.set(BUDGET)
        try:
            text = self._template.render(
                messages=_unmarked(messages), add_generation_prompt=add_generation_prompt, **tokens
            )
            _pay(len(text))
        except _FAULTS as error:
            raise ValueError(
                f"the chat template of {self.name} fails on this dialogue: {_said(error)}"
            ) from None
        finally:
            _left.reset(used)
        return _spans(text)


def _said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _unmarked(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_UNMARKED)
    if isinstance(value, Mapping):
        return {key: _unmarked(item) for key, item in value.items()}
    return [_unmarked(item) for item in value] if isinstance(value, list | tuple) else value


def _spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and what stood between them."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length, begun = 0, 0
    for number, piece in enumerate(text.split(_BEGIN)):
        inner, closed, outer = piece.partition(_END)
        if number:
            begun = length
        if number and closed:
            spans.append((begun, begun + len(inner)))
        outer = outer.replace(_END, "")
        pieces += [inner, outer]
        length += len(inner) + len(outer)
    return "".join(pieces), [span for span in spans if span[1] > span[0]]


def _pay(characters: int, steps: int = 1) -> None:
    """Take from the budget of the rendering.

    Raises:
        SecurityError: it is spent, or one text is too long.
    """
    left = _left.get(BUDGET) - steps - characters // 1024
    if left < 0 or characters > MAX_TEXT:
        raise SecurityError("it makes more text, or takes more steps, than a dialogue needs")
    _left.set(left)


def _size(value: Any) -> int:
    """Characters that a value takes when written; what holds itself many times over is found out in time."""
    waiting, size = [value], 0
    while waiting:
        item = waiting.pop()
        size += len(item) if isinstance(item, str) else 64
        if size > MAX_TEXT:
            raise SecurityError("it writes a value that is too large")
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
    return size


@pass_context
def _counted(_: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _pay(0)
        yield value


@pass_context
def _joined(_: Any, values: list[Any]) -> str:
    _pay(sum(_size(value) for value in values))
    return "".join(str(value) for value in values)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _pay(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[Any], between: Any = "", attribute: Any = None) -> str:
    items = list(values)
    if attribute is not None:
        items = [item.get(attribute) if isinstance(item, Mapping) else None for item in items]
    _pay(sum(_size(item) + len(str(between)) for item in items))
    return str(between).join(str(item) for item in items)


def _indent(text: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise SecurityError("it indents by more than 64")
    _pay(len(str(text)) + width * str(text).count("\n"))
    return FILTERS["indent"](str(text), width, first, blank)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("it indents by more than 16")
    _pay(_size(value))
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _pay(len(text))
    return text


def _range(*bounds: int) -> range:
    made = range(*bounds)
    _pay(0, len(made))
    return made


def _raise(message: Any) -> None:
    raise TemplateError(str(message)[:300])


class _Bounds(NodeTransformer):
    """Puts the budget into loops and joined texts, and refuses other files."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        listed = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(listed, "_joined", [], [], None, None, lineno=node.lineno)

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise TemplateSyntaxError("it asks for another file, and none is read", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


class _Generation(Extension):
    """The tag that says which words are the assistant's."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._written,
        )
        self.filters = {name: FILTERS[name] for name in _FILTERS if name in FILTERS}
        self.filters |= {
            "_counted": _counted, "_joined": _joined, "replace": _replace, "join": _join, "indent": _indent,
            "tojson": _to_json,
        }  # fmt: skip
        self.globals = {
            "range": _range, "namespace": self.globals["namespace"], "dict": dict, "raise_exception": _raise,
        }  # fmt: skip

    @staticmethod
    @pass_context
    def _written(_: Any, value: Any) -> Any:
        _pay(_size(value))
        return value

    def _generate(self, source: nodes.Template, *rest: Any, **more: Any) -> str:
        return super()._generate(_Bounds().visit(source), *rest, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _pay(sum(_size(side) for side in (left, right) if isinstance(side, str | list | tuple)))
        elif operator in ("*", "**") and not (_small(left) and _small(right)):
            raise SecurityError(f"it calculates with {operator} beyond small numbers")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("it formats a text with %")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("it formats a text, which may ask for any width")
        return None

    def call(self, *arguments: Any, **named: Any) -> Any:
        called, given = arguments[1], arguments[2:]
        _pay(0)
        if isinstance(called, types.BuiltinMethodType) and not isinstance(called.__self__, types.ModuleType):
            if called.__name__ not in _METHODS:
                raise SecurityError(f"it calls {called.__name__}, which no chat template needs")
            if isinstance(called.__self__, str) and called.__name__ == "replace":
                return _replace(called.__self__, *given)
            if isinstance(called.__self__, str) and called.__name__ == "join":
                return _join(given[0], called.__self__)
        return super().call(*arguments, **named)


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= 10_000
