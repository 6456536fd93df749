"""docs/troubleshooting.md has a row for every error message of the scripts: sources and page are read, nothing runs.

A row begins with one or more patterns in backticks. `...` stands for any value, and a pattern is a part of a message:
`holds no image` covers every message with these words. Many messages share a row, so a new one mostly has one already.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from source_tree import ROOT, scripts

PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"  # stands for what is put into a message
WORDS_OF_A_PATTERN = 2  # at least, or the name of a flag: one word alone would cover too much
RAISED = {
    "trainkit": ("UserError", "warn", "Failure"),
    "tools": ("UserError", "warn"),
    "pipelines": ("ValueError",),
}
# Messages of Python, torch and diffusers, which no source here raises.
OF_OTHERS = (
    "Connect timeout", "Gloo connectFullMesh failed", "CUDA out of memory", "No module named 'trainkit'",
    "trust_remote_code=True", "Killed", "command not found", "No space left on device",
)  # fmt: skip


def text_of(node: ast.expr) -> str:
    """The text of a string with `VALUE` for each part that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return VALUE


def texts_of(node: ast.expr, inside: ast.AST, module: ast.Module) -> Iterator[str]:
    """The texts that `node` may have: its own, those of the variable, or what the called function returns."""
    if isinstance(node, ast.IfExp):
        yield from texts_of(node.body, inside, module)
        yield from texts_of(node.orelse, inside, module)
    elif isinstance(node, ast.Name):
        for each in ast.walk(inside):
            if isinstance(each, ast.Assign) and any(getattr(name, "id", "") == node.id for name in each.targets):
                if not isinstance(each.value, ast.Name):
                    yield from texts_of(each.value, inside, module)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for each in ast.walk(module):
            if isinstance(each, ast.FunctionDef) and each.name == node.func.id:
                returned = [part.value for part in ast.walk(each) if isinstance(part, ast.Return)]
                yield from (text for value in returned if value for text in texts_of(value, each, module))
    else:
        yield text_of(node)


def messages_of(source: str, raised: tuple[str, ...]) -> list[tuple[int, str]]:
    """Line and text of each message that `source` raises or warns with, those without a word of their own left out."""
    module = ast.parse(source)
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    found = {}
    for function in [module, *functions]:  # an inner function comes after the one around it
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in raised and node.args:
                found[node.lineno] = (node.args[0], function)
    return [
        (line, " ".join(text.split()))
        for line, (argument, function) in found.items()
        for text in texts_of(argument, function, module)
        if len(re.findall(r"[a-z]{3,}", text.replace(VALUE, " "))) >= WORDS_OF_A_PATTERN
    ]


def sources() -> list[Path]:
    return [*scripts(), *(file for folder in RAISED for file in sorted((ROOT / folder).rglob("*.py")))]


@cache
def messages() -> list[tuple[str, str]]:
    """`file:line` and text of every message."""
    found = []
    for file in sources():
        name = file.relative_to(ROOT)
        raised = RAISED.get(name.parts[0], RAISED["trainkit"])
        found += [(f"{name}:{line}", text) for line, text in messages_of(file.read_text(encoding="utf-8"), raised)]
    return found


@cache
def all_texts() -> list[str]:
    """Every string of the sources, of which a message may be put together."""
    return [
        " ".join(text_of(node).split())
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


@cache
def patterns(page: Path = PAGE) -> list[str]:
    """The patterns at the begin of the rows of the tables under `## Error messages`."""
    section = page.read_text(encoding="utf-8").partition("\n## Error messages\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section.replace(r"\|", "/"), re.MULTILINE)
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]


def covers(pattern: str, message: str) -> bool:
    """Whether the pieces of `pattern` between its `...` are in `message`, in this order."""
    place = 0
    for piece in filter(None, (piece.strip() for piece in pattern.split("..."))):
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def test_the_rules_of_matching():
    source = 'def f(x):\n    raise UserError(f"--flag {x} is wrong" + " here: give another")\n'
    [(line, text)] = messages_of(source, ("UserError",))
    assert line == 2 and text == f"--flag {VALUE} is wrong here: give another"
    assert covers("--flag ... is wrong ... another", text) and covers("wrong here", text)
    assert not covers("another ... wrong", text) and not covers("--flag ... is right", text)
    source = (
        "def why(x):\n    if x:\n        return 'the first reason'\n    return f'the second {x}'\n"
        "def g(x):\n    problem = why(x)\n    raise UserError(problem)\n"
    )
    assert {text for _, text in messages_of(source, ("UserError",))} == {"the first reason", f"the second {VALUE}"}


def test_every_message_has_a_row():
    assert len(messages()) > 400
    missing = [
        f"{place}: {text.replace(VALUE, '...')}"
        for place, text in messages()
        if not any(covers(pattern, text) for pattern in patterns())
    ]
    assert not missing, (
        "docs/troubleshooting.md has no row for these messages: add a few words of each, in backticks, to the row of "
        "their family, or a row with cause and fix\n" + "\n".join(missing)
    )


def test_every_row_is_about_a_message():
    broad = [
        pattern
        for pattern in patterns()
        if pattern not in OF_OTHERS and len(pattern.replace("...", "").split()) < WORDS_OF_A_PATTERN
        and not re.search("--|_|:", pattern)
    ]  # fmt: skip
    assert not broad, f"docs/troubleshooting.md: one word is not enough in {broad}"
    rest = [pattern for pattern in patterns() if not any(covers(pattern, text) for _, text in messages())]
    unknown = [
        pattern
        for pattern in rest
        if pattern not in OF_OTHERS and not any(covers(pattern, text) for text in all_texts())
    ]
    assert not unknown, f"docs/troubleshooting.md: no source says {unknown}: delete the patterns, or correct them"
