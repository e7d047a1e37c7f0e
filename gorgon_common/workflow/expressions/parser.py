"""Builds a syntax tree from tokens: a Pratt parser for our subset of CEL."""

from __future__ import annotations

from gorgon_common.workflow.expressions import tree
from gorgon_common.workflow.expressions.errors import ExpressionSyntaxError
from gorgon_common.workflow.expressions.lexer import Token, tokenize
from gorgon_common.workflow.expressions.names import CEL_WORDS, FUNCTIONS, did_you_mean

MAX_DEPTH = 100
"""Maximum depth of a syntax tree; keeps every walk far from Python's own recursion limit."""

MAX_NESTING = 40
"""Maximum nesting of parentheses, brackets and calls; the parser needs up to eight stack frames per level."""

MAX_COMPREHENSIONS = 2
"""A comprehension and one nested level."""

_POWER = {
    "?": 1, "||": 2, "&&": 3,
    "==": 4, "!=": 4, "<": 4, "<=": 4, ">": 4, ">=": 4, "in": 4,
    "+": 5, "-": 5, "*": 6, "/": 6, "%": 6,
}  # fmt: skip

_UNARY_POWER = 7

_COMPREHENSIONS = {"all": (2,), "exists": (2,), "exists_one": (2,), "filter": (2,), "map": (2, 3)}

ARITY: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        ("size", "int", "uint", "double", "string", "bool", "timestamp", "duration", "dyn", "type"), (1, 1)
    ),
    **dict.fromkeys(("contains", "startsWith", "endsWith", "matches", "split", "truncate", "default"), (2, 2)),
    "json": (1, 1),
    "lines": (1, 1),
    "join": (1, 2),
    **{name: (1, 1) for name in FUNCTIONS if name.startswith("get")},
}
"""Function → its minimum and maximum number of arguments, including the target of a method call."""

_WORDS = {"and": "&&", "or": "||", "not": "!", "is": "=="}

_LITERALS = {"true": True, "false": False, "null": None}


def parse_tokens(source: str, start: int = 0, *, closing: bool = False) -> tuple[tree.Node, int]:
    """Return the tree of the expression at `start`, and the offset after it (after its `}}` with `closing`).

    Raises ExpressionSyntaxError.
    """
    parser = _Parser(tokenize(source, start, closing=closing))
    node = parser.whole(start)
    return node, parser.token.end


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.position]

    def whole(self, start: int) -> tree.Node:
        if self.token.kind == "end":
            raise ExpressionSyntaxError("the expression is empty", start)
        node = self.expression(0)
        if self.token.kind != "end":
            raise self.unexpected("after the expression")
        _check_shape(node)
        return node

    def advance(self) -> Token:
        token = self.token
        self.position += 1
        return token

    def at(self, op: str) -> bool:
        return self.token.kind == "op" and self.token.value == op

    def expect(self, op: str, what: str) -> Token:
        if not self.at(op):
            raise self.unexpected(f"`{op}` is missing {what}")
        return self.advance()

    def unexpected(self, why: str) -> ExpressionSyntaxError:
        token = self.token
        if token.kind == "end":
            return ExpressionSyntaxError(f"the expression ends too early: {why}", token.offset)
        shown = token.value if token.kind in ("op", "ident") else repr(token.value)[:40]
        hint = ""
        if token.kind == "ident" and token.value in _WORDS:
            hint = f"Write `{_WORDS[token.value]}`."
        return ExpressionSyntaxError(f"unexpected `{shown}`: {why}", token.offset, hint)

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ExpressionSyntaxError(
                f"the expression is nested more than {MAX_NESTING} levels deep", self.token.offset
            )

    def expression(self, power: int) -> tree.Node:
        self.deeper()
        left = self.unary()
        while True:
            token = self.token
            op = token.value if token.kind == "op" or token.value == "in" else None
            binding = _POWER.get(op, 0) if isinstance(op, str) and token.kind in ("op", "ident") else 0
            if binding <= power:
                break
            self.advance()
            if op == "?":
                yes = self.expression(1)
                self.expect(":", "between the two values of `? :`")
                left = tree.Ternary(left.offset, left, yes, self.expression(0))
            else:
                left = tree.Binary(left.offset, str(op), left, self.expression(binding), token.offset)
        self.depth -= 1
        return left

    def unary(self) -> tree.Node:
        token = self.token
        if token.kind == "op" and token.value in ("!", "-"):
            self.deeper()
            self.advance()
            following = self.token
            if token.value == "-" and _is_number(following):
                self.tokens[self.position] = Token("literal", -following.value, token.offset, following.end)
                node = self.member()
            else:
                node = tree.Unary(token.offset, token.value, self.unary())
            self.depth -= 1
            return node
        return self.member()

    def member(self) -> tree.Node:
        node = self.primary()
        while True:
            if self.at("."):
                self.advance()
                name = self.token
                if name.kind != "ident":
                    raise self.unexpected("a name is missing after `.`")
                self.advance()
                if self.at("("):
                    node = self.call(name, node)
                else:
                    node = tree.Select(node.offset, node, name.value, name.offset)
            elif self.at("["):
                self.advance()
                key = self.expression(0)
                self.expect("]", "after the index")
                node = tree.Index(node.offset, node, key)
            else:
                return node

    def primary(self) -> tree.Node:
        token = self.token
        if token.kind == "literal":
            self.advance()
            if token.value == 2**63:
                raise ExpressionSyntaxError(f"`{token.value}` is too large for an integer (64 bits)", token.offset)
            return tree.Literal(token.offset, token.value)
        if token.kind == "ident":
            return self.name()
        if token.kind == "op" and token.value == "(":
            self.advance()
            node = self.expression(0)
            self.expect(")", "to close the parenthesis")
            return node
        if token.kind == "op" and token.value == "[":
            self.advance()
            return tree.ListOf(token.offset, self.items("]"))
        if token.kind == "op" and token.value == "{":
            return self.mapping()
        raise self.unexpected("a value is missing")

    def name(self) -> tree.Node:
        token = self.advance()
        if token.value in _LITERALS:
            return tree.Literal(token.offset, _LITERALS[token.value])
        if token.value in _WORDS and not self.at(".") and not self.at("["):
            self.position -= 1
            raise self.unexpected("this is not an operator")
        if token.value in CEL_WORDS:
            raise ExpressionSyntaxError(f"`{token.value}` is a reserved word of the expression language", token.offset)
        if self.at("("):
            return self.call(token, None)
        return tree.Ident(token.offset, token.value)

    def items(self, closing: str) -> tuple[tree.Node, ...]:
        items: list[tree.Node] = []
        while not self.at(closing):
            items.append(self.expression(0))
            if not self.at(","):
                break
            self.advance()
        self.expect(closing, "at the end of the list")
        return tuple(items)

    def mapping(self) -> tree.Node:
        opening = self.advance()
        entries: list[tuple[tree.Node, tree.Node]] = []
        while not self.at("}"):
            key = self.expression(0)
            self.expect(":", "between key and value")
            entries.append((key, self.expression(0)))
            if not self.at(","):
                break
            self.advance()
        self.expect("}", "at the end of the mapping")
        return tree.MapOf(opening.offset, tuple(entries))

    def call(self, name: Token, target: tree.Node | None) -> tree.Node:
        self.advance()
        args = self.items(")")
        function = str(name.value)
        offset = name.offset if target is None else target.offset
        if target is not None and function in _COMPREHENSIONS:
            return _comprehension(name, target, args)
        if function == "has" and target is None:
            if len(args) != 1 or not isinstance(args[0], (tree.Select, tree.Index)):
                raise ExpressionSyntaxError("`has` takes one field: `has(plan.title)`", name.offset)
            return tree.Has(offset, args[0])
        if function not in ARITY:
            if function in _COMPREHENSIONS:
                raise ExpressionSyntaxError(f"`{function}` is called on a list: `xs.{function}(x, …)`", name.offset)
            raise ExpressionSyntaxError(
                f"there is no function `{function}`", name.offset, did_you_mean(function, FUNCTIONS)
            )
        arguments = args if target is None else (target, *args)
        least, most = ARITY[function]
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} or {most}"
            raise ExpressionSyntaxError(
                f"`{function}` takes {wanted} value{'s' if most > 1 else ''}, not {len(arguments)}", name.offset
            )
        return tree.Call(offset, function, arguments)


def _is_number(token: Token) -> bool:
    return token.kind == "literal" and isinstance(token.value, (int, float)) and not isinstance(token.value, bool)


def _comprehension(name: Token, over: tree.Node, args: tuple[tree.Node, ...]) -> tree.Node:
    macro = str(name.value)
    if len(args) not in _COMPREHENSIONS[macro] or not isinstance(args[0], tree.Ident):
        raise ExpressionSyntaxError(f"`{macro}` takes a name and an expression: `xs.{macro}(x, x.done)`", name.offset)
    test = args[1] if macro != "map" or len(args) == 3 else None
    value = args[-1] if macro == "map" else None
    return tree.Comprehension(over.offset, macro, over, args[0].name, test, value)


def _check_shape(root: tree.Node) -> None:
    """Reject trees that are too deep (long chains of operators) and comprehensions nested too deeply."""
    stack = [(root, 1, 0)]
    while stack:
        node, depth, inside = stack.pop()
        if depth > MAX_DEPTH:
            raise ExpressionSyntaxError(
                f"the expression has more than {MAX_DEPTH} levels", node.offset, "Split it, or use `in` with a list."
            )
        if isinstance(node, tree.Comprehension):
            if inside >= MAX_COMPREHENSIONS:
                raise ExpressionSyntaxError(
                    f"`{node.macro}` is nested too deeply: a comprehension may contain one more level",
                    node.offset,
                    "Do part of the work in a step of its own.",
                )
            stack.append((node.over, depth + 1, inside))
            stack.extend((part, depth + 1, inside + 1) for part in (node.test, node.value) if part is not None)
        else:
            stack.extend((child, depth + 1, inside) for child in tree.children(node))
