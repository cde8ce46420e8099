"""One stage of one iteration of a run, and where its stamp lies.

runs/arithmetic/iter-1/.stamps/pairs.json
{"stage": "pairs", "values": {"selection": "first", …}, "inputs": {"…/generations.jsonl": "9f8e…"},
 "outputs": {"…/pairs.jsonl": "41c0…", …}, "seconds": 0.2, "seed": 0,
 "command": "thinkswitch pairs runs/arithmetic 1", "versions": {…}}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkswitch_plugin.run.folder import Run
from thinkswitch_plugin.run.hashes import Hashes


@dataclass(frozen=True)
class Stage:
    """One stage of one iteration: what it reads, depends on and writes.

    Args:
        resume_on: a failed attempt is continued if the inputs and these values are the same;
            None: the stage always starts anew.
        needs: must be there for the stage to count as done, but are not its outputs.
        scratch: what an attempt leaves beside its outputs to continue from.
        writes_like: a checkpoint about as large as what the stage writes.
    """

    name: str
    iteration: int
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    values: dict[str, Any] = field(default_factory=dict)
    resume_on: tuple[str, ...] | None = None
    needs: tuple[Path, ...] = ()
    scratch: tuple[Path, ...] = ()
    writes_like: Path | None = None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.name if self.name == "report" else f"{self.name} of iteration {self.iteration}"

    def resumed_part(self, key: Any) -> Any:
        """The part of `depends_on` that half-finished outputs depend on."""
        values = key.get("values")
        found = {name: values.get(name) for name in self.resume_on or ()} if isinstance(values, dict) else None
        return key.get("inputs"), found

    def depends_on(self, hashes: Hashes) -> dict[str, Any]:
        """The settings and the hashes of the inputs, as the stamp records them."""
        return {"values": self.values, "inputs": {str(p): hashes.of(p) for p in self.inputs}}


def stamp_path(run: Run, stage: Stage) -> Path:
    """The stamp of a stage, which is also its target in the Makefile."""
    folder = run.folder if stage.name == "report" else run.iteration(stage.iteration)
    return folder / ".stamps" / f"{stage.name}.json"
