"""Reads C++ sources as far as the architecture tests need it: includes and function lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
_LITERALS = re.compile(
    r'R"([^(\s]*)\(.*?\)\1"'  # raw string
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'"  # not the separator of 1'000
    r"|//[^\n]*|/\*.*?\*/",
    re.DOTALL,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", re.MULTILINE)
_SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b")
# "S(int n) : value" before "{": a member initialiser, not the body
_MEMBER_INIT = re.compile(r"\)[^{}]*(?<!:):(?!:)(?:[^{}]|\{[^{}]*\})*[\w>]\s*$")
_CONTROL = re.compile(r"^\s*(if|for|while|switch|do|else|try|catch|return)\b")


def includes(text: str) -> list[tuple[str, str]]:
    """All includes as (bracket, path); bracket is '<' or '"'."""
    return _INCLUDE.findall(text)


def _blank(match: re.Match[str]) -> str:
    """Same number of lines, no braces."""
    return re.sub(r"[^\n]", " ", match.group(0))


@dataclass(frozen=True)
class Function:
    """A function definition: name, first line (1-based), number of lines with its signature."""

    name: str
    line: int
    lines: int


def _name_of(head: str) -> str:
    before = head[: head.index("(")].rstrip()
    found = re.search(r"[\w:~]+$|operator\S*$", before)
    name = found.group(0) if found else "?"
    if name in {"TEST", "TEST_F", "TEST_P"}:
        name += re.sub(r"\s+", " ", head[head.index("(") :].strip())
    return name


def functions(text: str) -> list[Function]:
    """Function definitions at namespace and class scope. Lambdas count to what encloses them."""
    code = _DIRECTIVE.sub(_blank, _LITERALS.sub(_blank, text))
    found: list[Function] = []
    stack: list[tuple[str, int, str]] = []  # kind, line of the head, name
    head_start = 0
    for position, char in enumerate(code):
        if char not in "{};":
            continue
        inside_function = any(kind != "scope" for kind, _, _ in stack)
        if char == "{":
            head = code[head_start:position]
            kind, name = _classify(head, inside_function)
            skipped = len(head) - len(head.lstrip())
            line = code.count("\n", 0, head_start + skipped) + 1
            stack.append((kind, line, name))
            if kind == "braces":
                continue  # the statement goes on behind an initialiser
        elif char == "}" and stack:
            kind, line, name = stack.pop()
            if kind == "function":
                last = code.count("\n", 0, position) + 1
                found.append(Function(name, line, last - line + 1))
            if kind == "braces":
                continue
        elif char == ";" and stack and stack[-1][0] == "braces":
            continue
        head_start = position + 1
    return found


def _classify(head: str, inside_function: bool) -> tuple[str, str]:
    if inside_function:
        return "inner", ""
    bare = re.sub(r"\[\[.*?\]\]|<[^<>;{}()]*>", " ", head)
    before_paren = bare.split("(")[0]
    if _SCOPE.search(before_paren):
        return "scope", ""
    if "(" not in head or "=" in before_paren.replace("operator=", ""):
        return "braces", ""
    if re.search(r"[^=!<>]=\s*$", head) or _MEMBER_INIT.search(head):
        return "braces", ""
    if _CONTROL.match(head):
        return "inner", ""
    return "function", _name_of(head)


def read(path: Path) -> str:
    """Text of a source file; undecodable bytes are kept as they are."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")
