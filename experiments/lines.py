"""Lines of Python by room of the package, of the checkout or of a commit: `make lines COMMIT=main~5`.

Two counts: all lines, and those with code (no blank lines, comments or docstrings).
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
WHEEL = "thinkswitch_plugin"


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def code_lines(source: str) -> int:
    """Lines that hold code."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in SILENT
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


if __name__ == "__main__":
    commit = sys.argv[1] if len(sys.argv) > 1 else ""
    listed = git("ls-tree", "-r", "--name-only", commit) if commit else git("ls-files", "-co", "--exclude-standard")
    every: Counter[str] = Counter()
    code: Counter[str] = Counter()
    for name in (name for name in listed.splitlines() if name.endswith(".py") and (commit or Path(name).is_file())):
        parts = name.split("/")
        room = "/".join(parts[:2]) if parts[0] == WHEEL and len(parts) > 2 else parts[0]
        source = git("show", f"{commit}:{name}") if commit else Path(name).read_text()
        every[room] += len(source.splitlines())
        code[room] += code_lines(source)
    print("  lines     code")
    for room in sorted(every):
        print(f"{every[room]:7,}  {code[room]:7,}  {room}")
    wheel = [sum(n for room, n in counted.items() if room.startswith(WHEEL)) for counted in (every, code)]
    print(f"{wheel[0]:7,}  {wheel[1]:7,}  the wheel's {WHEEL} in all")
