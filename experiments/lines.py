"""Lines of Python by room of the package, of the checkout or of a commit: `make lines COMMIT=main~5`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    commit = sys.argv[1] if len(sys.argv) > 1 else ""
    listed = git("ls-tree", "-r", "--name-only", commit) if commit else git("ls-files", "-co", "--exclude-standard")
    counted: Counter[str] = Counter()
    for name in (name for name in listed.splitlines() if name.endswith(".py") and (commit or Path(name).is_file())):
        parts = name.split("/")
        room = "/".join(parts[:2]) if parts[0] == "thinkswitch_plugin" and len(parts) > 2 else parts[0]
        counted[room] += len((git("show", f"{commit}:{name}") if commit else Path(name).read_text()).splitlines())
    for room, lines in sorted(counted.items()):
        print(f"{lines:7,}  {room}")
    print(
        f"{sum(n for room, n in counted.items() if room.startswith('thinkswitch_plugin')):7,}  the wheel's thinkswitch_plugin in all"
    )
