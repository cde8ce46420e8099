"""Rebuild the thinking checkpoint with mergekit, and check that it still thinks.

The config used, with the real folders and λ in it, is kept as `iter-k/merge.yaml`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thinkswitch_plugin import console, files, places
from thinkswitch_plugin.args import EngineKeys, RebuildKeys
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import pairs
from thinkswitch_plugin.data.guard import FEWEST_TRACES
from thinkswitch_plugin.data.traces import Outcome
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.engines.servers import choose
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import Allowances, require_compatible
from thinkswitch_plugin.merging.config import allow, place_models, set_lambda
from thinkswitch_plugin.merging.similarity import similarity
from thinkswitch_plugin.run import checkpoint, processes
from thinkswitch_plugin.run.hardware import has_cuda

SMALL_SET = 100  # up to so many prompts, one may fail to think without failing the check


def asked_ids(requests: Path, limit: int | None = None) -> list[str]:
    """The ids of the first `limit` requests."""
    return [row["custom_id"] for _, row in itertools.islice(files.read_jsonl(requests), limit)]


def think_ratio(
    requests: Path, generations: Path, ids: Sequence[str], convention: Convention | None = None
) -> tuple[int, int]:
    """(completions with a closed trace, completions that were not cut), of the requests with these ids."""
    wanted = set(ids)
    asked = {custom_id: how for custom_id, how in pairs.read_asked(requests, convention).items() if custom_id in wanted}
    found = [done for _, _, done in pairs.completions(generations, asked, pairs.PairReport())]
    whole = [done for done in found if not done.cut and done.outcome is not Outcome.FAILED]
    return sum(done.closed_trace for done in whole), len(whole)


@dataclass(frozen=True)
class Baseline:
    """How often the original thinking checkpoint thought: completions with a closed trace, not cut, and all."""

    closed: int
    whole: int
    asked: int

    @property
    def ratio(self) -> float:
        """The think ratio."""
        return self.closed / self.whole if self.whole else 0.0

    def require_traces(self, reference: Path, keys: RebuildKeys) -> None:
        """Raise `ThinkSwitchError` where it (nearly) never thought: any λ would do as well."""
        if self.ratio < FEWEST_TRACES and keys.min_think_ratio:
            raise ThinkSwitchError(
                f"{reference}: {self.closed} of {self.whole} finished completions of the original thinking checkpoint have "
                "a closed trace, so a rebuilt one cannot be compared with it: set `thinkswitch.trace` to the convention in "
                "which it writes its trace, raise `thinkswitch.sampling.max_tokens` if its traces are cut, or set "
                "`thinkswitch.rebuild.min_think_ratio: 0` if it writes none."
            )


def baseline(
    requests: Path, generations: Path, tried_on: Sequence[str], convention: Convention | None = None
) -> Baseline:
    """The original on the very requests that a candidate answers, if it was asked them and one was not cut, else on all.

    Prompts differ in how many of their traces the token limit cuts.
    """
    known = asked_ids(requests)
    for ids in (tried_on, known):
        closed, whole = think_ratio(requests, generations, ids, convention) if set(ids) <= set(known) else (0, 0)
        if whole or ids is known:
            break
    return Baseline(closed, whole, len(ids))


def still_thinks(closed: int, whole: int, asked: int, *, needed: float, whole_share: float) -> bool:
    """Whether a share of closed traces is enough, with one prompt of tolerance on small sets.

    Cut completions are counted apart; a checkpoint that is cut far more often has not shown
    that it ends its traces, so at least half of the original's share must be whole.

    Args:
        closed, whole, asked: completions with a closed trace, not cut, and all.
        needed: share of closed traces among the whole ones.
        whole_share: share of the original's completions that were whole.
    """
    tolerance = 1 if whole <= SMALL_SET else 0
    return whole > 0 and whole >= 0.5 * whole_share * asked and closed + tolerance >= needed * whole


def merge(config: Path, out: Path, log: Path) -> None:
    """Run mergekit on a config, through `thinkswitch merge`, which knows our method too."""
    command: list[str | Path] = [
        Path(sys.executable).with_name("thinkswitch"),
        "merge",
        config,
        out,
        "--copy-tokenizer",
        "--lazy-unpickle",
    ]
    if has_cuda():
        command.append("--cuda")
    processes.run_logged(command, log, title="mergekit")


def rebuild_thinking(
    *,
    instruct: Path,
    anchor: Path,
    keys: RebuildKeys,
    out: Path,
    merge_yaml: Path,
    reference: Path,
    reference_requests: Path,
    requests: Path,
    engine: str,
    engine_keys: EngineKeys,
    convention: Convention | None = None,
    retry_max_tokens: int | None = None,
    logs: Path,
    cards: Callable[[Path, str], None],
) -> dict[str, Any]:
    """Interpolate, measure the think ratio on training prompts, and accept or raise λ.

    Args:
        instruct, anchor: the two checkpoints; the anchor is a thinking one.
        reference, reference_requests: what the *original* thinking checkpoint answered;
            its think ratio is the measure.
        requests: the training prompts to try the candidate on (no labels needed).
        convention: how the recipe says that traces are written.
        retry_max_tokens: as the reference was asked, what was cut is asked again with this budget.

    Returns:
        What `rebuild.json` holds: method, λ, every λ tried with its think ratio, σ, angles.

    Raises:
        ThinkSwitchError: the pair does not match, or no λ of the list keeps the checkpoint thinking.
    """
    tried_on = asked_ids(requests, keys.check_prompts)
    before = baseline(reference_requests, reference, tried_on, convention)
    before.require_traces(reference, keys)
    require_compatible(instruct, anchor, Allowances(may_differ=tuple(keys.may_differ)))
    nearness = similarity(instruct, anchor)
    config_path = places.find(keys.config)
    template = allow(files.read_yaml(config_path), keys.may_differ)
    roles = {"instruct": str(instruct), "thinking": str(anchor)}
    # A server of the user's own does not serve a candidate.
    judge = choose("auto") if engine.startswith("http") else engine
    tried: list[dict[str, Any]] = []
    candidates = [keys.lambda_, *(step for step in keys.lambda_steps if step > keys.lambda_)]
    candidate = files.temporary_sibling(out)
    for weight in candidates:
        config = place_models(set_lambda(template, weight, config_path), roles)
        text = yaml.safe_dump(config, sort_keys=False)
        files.write_yaml(merge_yaml, config, header=f"λ = {weight:g}. Runs by itself: thinkswitch merge THIS_FILE OUT")
        files.remove(candidate)
        merge(merge_yaml, candidate, logs / "merge.log")
        checkpoint.adopt_mode(anchor, candidate)
        answers = logs / f"check-lambda-{weight:g}.jsonl"  # a killed attempt's answers count: the merge repeats
        generate(
            requests,
            answers,
            str(candidate),
            judge,
            engine_keys,
            limit=keys.check_prompts,
            retry_max_tokens=retry_max_tokens,
            log=logs / "check.log",
            title=f"check λ={weight:g}",
        )
        closed, whole = think_ratio(requests, answers, tried_on, convention)
        asked = sum(1 for _ in files.read_jsonl(answers))
        ratio = closed / whole if whole else 0.0
        tried.append({"lambda": weight, "think_ratio": ratio, "prompts": asked, "cut": asked - whole})
        console.say(
            f"  λ {weight:g}: think ratio {ratio:.3f} on {asked} training prompts (original {before.ratio:.3f})"
        )
        needed, whole_share = keys.min_think_ratio * before.ratio, before.whole / before.asked
        if still_thinks(closed, whole, asked, needed=needed, whole_share=whole_share):
            cards(candidate, text)
            files.put_in_place(candidate, out)
            return {
                "method": template["merge_method"],
                "lambda": weight,
                "anchor": str(anchor),
                "think_ratio": ratio,
                "think_ratio_original": before.ratio,
                "tried": tried,
                **nearness,
            }
    files.remove(candidate)
    shown = ", ".join(f"{t['lambda']:g} → {t['think_ratio']:.2f}, {t['cut']} of {t['prompts']} cut" for t in tried)
    raise ThinkSwitchError(
        f"No λ keeps the rebuilt checkpoint thinking (λ → think ratio of what was not cut: {shown}; the "
        f"original has {before.ratio:.2f}, {before.asked - before.whole} of {before.asked} cut). The last good pair is kept; raise "
        "`thinkswitch.rebuild.lambda`, add to `lambda_steps`, or train less; where the token limit cut most, raise "
        "`thinkswitch.sampling.max_tokens`."
    )
