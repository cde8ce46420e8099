"""Rebuild the thinking checkpoint with mergekit, and check that it still thinks.

Every λ is tried in memory (`merging/holding.py`); a checkpoint is written for the one that is accepted.
The config used, with the real folders and λ in it, is kept as `iter-k/merge.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import EngineKeys, RebuildKeys
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import batch, distributions, pairs
from thinkswitch_plugin.data.pairs import FEWEST_TRACES
from thinkswitch_plugin.data.traces import Outcome
from thinkswitch_plugin.engine_args import addresses
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.engines.servers import choose
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import verdict
from thinkswitch_plugin.merging.command import write_merge
from thinkswitch_plugin.merging.compatibility import Allowances, align_compatible
from thinkswitch_plugin.merging.config import of_recipe, place_models, set_lambda
from thinkswitch_plugin.merging.similarity import similarity
from thinkswitch_plugin.run import checkpoint

if TYPE_CHECKING:
    from thinkswitch_plugin.engines.ask import Asker
    from thinkswitch_plugin.merging.holding import Holder

SMALL_SET = 100  # up to so many prompts, one may fail to think without failing the check


def asked_ids(requests: Path, limit: int | None = None) -> list[str]:
    """The ids of the first `limit` requests. Raises `ThinkSwitchError` as `batch.read_requests`."""
    return [request["custom_id"] for _, request in batch.read_requests(requests, limit)]


@dataclass(frozen=True)
class Traces:
    """How often a checkpoint thought: completions with a closed trace, completions that were not cut, requests."""

    closed: int
    whole: int
    asked: int

    @property
    def ratio(self) -> float:
        """The think ratio."""
        return verdict.think_ratio(self.closed, self.whole)

    @property
    def cut(self) -> int:
        """Requests without a finished completion."""
        return self.asked - self.whole

    def require_some(self, reference: Path, keys: RebuildKeys) -> None:
        """Raise `ThinkSwitchError` if the original (nearly) never thought: any λ would do as well."""
        if self.ratio < FEWEST_TRACES and keys.min_think_ratio:
            raise ThinkSwitchError(
                f"{reference}: {self.closed} of {self.whole} finished completions of the original thinking checkpoint have "
                "a closed trace, so a rebuilt one cannot be compared with it: set `thinkswitch.trace` to the convention in "
                "which it writes its trace, raise `thinkswitch.sampling.max_tokens` if its traces are cut, or set "
                "`thinkswitch.rebuild.min_think_ratio: 0` if it writes none."
            )


def count_traces(requests: Path, generations: Path, ids: Sequence[str], convention: Convention | None = None) -> Traces:
    """How often the completions of the requests with these ids think, of each the one that `pairs` takes."""
    every = pairs.completions(requests, generations, convention, ids=set(ids))
    found = [one.done for one in every if one.done]
    whole = [done for done in found if not done.cut and done.outcome is not Outcome.FAILED]
    return Traces(sum(done.closed_trace for done in whole), len(whole), len(ids))


def still_thinks(found: Traces, before: Traces, share: float) -> bool:
    """Whether a candidate closes enough traces, with one prompt of tolerance on small sets.

    Cut completions are counted apart; a checkpoint that is cut far more often has not shown
    that it ends its traces, so at least half of the original's share must be whole.

    Args:
        found, before: the candidate's traces and the original's.
        share: of the original's think ratio that the candidate must keep.
    """
    tolerance = 1 if found.whole <= SMALL_SET else 0
    enough_whole = found.whole > 0 and found.whole >= 0.5 * before.whole / before.asked * found.asked
    return enough_whole and found.closed + tolerance >= share * before.ratio * found.whole


@dataclass(frozen=True)
class Check:
    """How the think ratio of candidates is measured.

    Attributes:
        requests: the training prompts that a candidate answers; no labels are needed.
        reference_requests, reference: what the original thinking checkpoint was asked, and its answers.
        engine, engine_keys: who answers; a server of the user's own does not serve a candidate.
        convention: how the recipe says that traces are written.
        retry_max_tokens: the budget with which cut answers are asked again, as the original's were.
        logs: the folder for answers and logs.
    """

    requests: Path
    reference_requests: Path
    reference: Path
    engine: str
    engine_keys: EngineKeys
    logs: Path
    convention: Convention | None = None
    retry_max_tokens: int | None = None

    def original(self, limit: int) -> Traces:
        """The original on the very requests that a candidate answers, if it was asked them and finished one, else on all.

        Prompts differ in how many of their traces the token limit cuts.
        """
        ids, known = asked_ids(self.requests, limit), asked_ids(self.reference_requests)
        if set(ids) <= set(known):
            found = count_traces(self.reference_requests, self.reference, ids, self.convention)
            if found.whole:
                return found
        return count_traces(self.reference_requests, self.reference, known, self.convention)

    def holding(self, anchor: Path) -> AbstractContextManager[Holder]:
        """The engine that holds one candidate after the other; all have the mode of the anchor."""
        from thinkswitch_plugin.merging.holding import MergeJob, holding

        keys = self.engine_keys
        job = MergeJob(
            skeleton=anchor,
            template=anchor,
            keys=keys,
            work=self.logs,
            log=self.logs / "check.log",
            batch=keys.concurrency,
            budget=self.retry_max_tokens or 0,
        )
        return holding(choose("auto") if addresses(self.engine) else self.engine, job)

    def candidate(self, asker: Asker, weight: float, limit: int) -> Traces:
        """Have a merge with λ = `weight`, which an engine holds, answer the first `limit` requests."""
        answers = self.logs / f"check-lambda-{weight:g}.jsonl"  # a killed attempt's answers count: the merge repeats
        generate(
            self.requests,
            answers,
            f"λ={weight:g}",
            asker,
            self.engine_keys,
            limit=limit,
            retry_max_tokens=self.retry_max_tokens,
            without=distributions.FIELDS,
            log=self.logs / "check.log",
            title=f"check λ={weight:g}",
        )
        return count_traces(self.requests, answers, asked_ids(self.requests, limit), self.convention)


def rebuild_thinking(
    instruct: Path, anchor: Path, keys: RebuildKeys, out: Path, check: Check, card: Callable[[Path, str], None]
) -> dict[str, Any]:
    """Interpolate in memory, measure the think ratio on training prompts, raise λ until it is accepted, then write it.

    Args:
        instruct, anchor: the two checkpoints; the anchor is a thinking one.
        out: the checkpoint to make; `merge.yaml` is written beside it.
        card: writes the model card into a folder, given the merge config as text.

    Returns:
        What `rebuild.json` holds: method, λ, every λ tried with its think ratio, σ, angles.

    Raises:
        ThinkSwitchError: the pair does not match, or no λ of the list keeps the checkpoint thinking.
    """
    before = check.original(keys.check_prompts)
    before.require_some(check.reference, keys)
    align_compatible([instruct, anchor], Allowances(may_differ=tuple(keys.may_differ)))
    nearness = similarity(instruct, anchor)
    template, source = of_recipe(keys)
    steps = [keys.lambda_, *(step for step in keys.lambda_steps if step > keys.lambda_)]
    tried: list[dict[str, Any]] = []
    with check.holding(anchor) as holder:
        for weight in steps:
            roles = {"instruct": str(instruct), "thinking": str(anchor)}
            config = place_models(set_lambda(template, weight, source), roles)
            header = f"λ = {weight:g}. Runs by itself: thinkswitch merge THIS_FILE OUT"
            files.write_yaml(out.with_name("merge.yaml"), config, header=header)
            found = check.candidate(holder.hold(config), weight, keys.check_prompts)
            tried.append({"lambda": weight, "think_ratio": found.ratio, "prompts": found.asked, "cut": found.cut})
            console.say(
                f"  λ {weight:g}: think ratio {found.ratio:.3f} on {found.asked} training prompts "
                f"(original {before.ratio:.3f})"
            )
            if accepted := still_thinks(found, before, keys.min_think_ratio):
                break
    if not accepted:
        raise _refusal(tried, before)
    write_accepted(out, anchor, check.logs, lambda folder: card(folder, yaml.safe_dump(config, sort_keys=False)))
    return {
        "method": template["merge_method"],
        "lambda": weight,
        "anchor": str(anchor),
        "think_ratio": found.ratio,
        "think_ratio_original": before.ratio,
        "tried": tried,
        **nearness,
    }


def write_accepted(out: Path, anchor: Path, logs: Path, card: Callable[[Path], None]) -> None:
    """Carry out `merge.yaml`, which lies beside `out`, as the checkpoint `out` with the mode of the anchor."""
    candidate = files.temporary_sibling(out)
    files.remove(candidate)
    write_merge(out.with_name("merge.yaml"), candidate, logs / "merge.log")
    checkpoint.adopt_mode(anchor, candidate)
    card(candidate)
    files.put_in_place(candidate, out)


def _refusal(tried: Sequence[Mapping[str, Any]], before: Traces) -> ThinkSwitchError:
    shown = ", ".join(f"{t['lambda']:g} → {t['think_ratio']:.2f}, {t['cut']} of {t['prompts']} cut" for t in tried)
    return ThinkSwitchError(
        f"No λ keeps the rebuilt checkpoint thinking (λ → think ratio of what was not cut: {shown}; the "
        f"original has {before.ratio:.2f}, {before.cut} of {before.asked} cut). The last good pair is kept; raise "
        "`thinkswitch.rebuild.lambda`, add to `lambda_steps`, or train less; if the token limit cut most, raise "
        "`thinkswitch.sampling.max_tokens`."
    )
