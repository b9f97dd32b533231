"""Which Jinja2 a prompt may use: what writes a history in a time and a size that grow with it, and no more.

The sandbox keeps a template from files and from Python, not from taking for ever: two loops in one another,
or a string that is doubled line by line, are enough.
"""

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 65_536
FILTERS = frozenset({"capitalize", "first", "join", "last", "length", "list", "lower", "reverse", "title",
                     "trim", "upper"})  # fmt: skip
_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If),
    *(nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test),
    *(nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or, nodes.CondExpr),
    *(nodes.Add, nodes.Sub, nodes.Neg, nodes.Concat),
)


def compile_template(text: str) -> jinja2.Template:
    """Return the template of a prompt.

    Raises:
        ValueError, jinja2.TemplateError: it is none, or uses more than writing a history needs.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARACTERS}")
    sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    sandbox.globals.clear()  # loops go over the history, not over a range of any length
    _check(sandbox.parse(text), in_loop=False, in_join=False)
    return sandbox.from_string(text)


def _check(node: nodes.Node, *, in_loop: bool, in_join: bool) -> None:
    what = type(node).__name__.lower()
    if not isinstance(node, _ALLOWED):
        remedy = "write the history with one loop, `if`, `join` and text"
        raise ValueError(f"`{what}` in line {node.lineno} is not for prompts: {remedy}")
    if isinstance(node, nodes.For):
        if in_loop or node.recursive:
            raise ValueError(f"line {node.lineno}: a loop in a loop is not for prompts")
        in_loop = True
    if isinstance(node, nodes.Filter):
        if node.name not in FILTERS:
            raise ValueError(f"filter `{node.name}` is not for prompts; use {', '.join(sorted(FILTERS))}")
        if not all(isinstance(argument, nodes.Const) for argument in node.args) or node.kwargs:
            raise ValueError(f"filter `{node.name}`: takes constants")
        if node.name == "join":
            if in_join:
                raise ValueError("`join` of a `join` is not for prompts")
            in_join = True
    for child in node.iter_child_nodes():
        _check(child, in_loop=in_loop, in_join=in_join)
