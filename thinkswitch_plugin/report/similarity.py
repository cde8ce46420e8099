"""How far two checkpoints are apart: `similarity.json`, its picture and a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.merging.compatibility import align_compatible
from thinkswitch_plugin.merging.kernel import MERGEKIT_LINEAR
from thinkswitch_plugin.merging.similarity import summarise, tensor_sums
from thinkswitch_plugin.report.pictures import save
from thinkswitch_plugin.report.search_pictures import similarity_picture


def report_similarity(first: Path, second: Path, out: Path) -> None:
    """Compare two checkpoints, print a short table, and write `similarity.json`, `.png` and `.svg` into `out`.

    Raises `ThinkSwitchError` as `require_compatible` and `similarity` do.
    """
    aligned = align_compatible([first, second])
    if aligned and aligned.carried:
        console.say(
            f"  left out, since transformers does not load them and only one holds them: {', '.join(aligned.carried)}"
        )
    sums = tensor_sums(first, second)
    data = {"first": str(first), "second": str(second), **summarise(sums)}
    files.write_json(out / "similarity.json", data)
    save(similarity_picture(data), out / "similarity")
    console.say("\n".join(words(data)))
    console.say(f"  {out / 'similarity.json'}, {out / 'similarity.png'} and .svg")


def words(data: dict[str, Any]) -> list[str]:
    """What the terminal shows of `summarise`'s numbers."""
    rows = [
        f"σ = {data['sigma']:.4f} over {len(data['tensors'])} tensors",
        f"  {'':18} {'min':>9} {'median':>9} {'max':>9}",
    ]
    for key, title in (("angle", "angle (rad)"), ("distance", "‖a−b‖/‖a‖"), ("sphere_gap", "SLERP − linear")):
        rows.append(f"  {title:18} " + " ".join(f"{data[key][part]:9.2g}" for part in ("min", "median", "max")))
    most = data["sphere_gap"]["max"]
    rows += [
        f"SLERP and linear interpolation differ by at most {most:{'.1%' if most >= 0.001 else '.1g'}} of a tensor's norm "
        f"for this pair (at λ = 0.5, in {data['sphere_gap']['where']}).",
        f"mergekit's slerp is itself linear (|cos| > {MERGEKIT_LINEAR}) in {data['linear_in_mergekit']:.0%} of the tensors.",
    ]
    return rows
