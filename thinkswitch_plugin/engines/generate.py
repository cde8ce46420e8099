"""Answer `requests.jsonl` by any engine; keep each answer as it arrives.

vLLM's own batch runner writes its output when the whole batch has ended, so a killed run loses every answer. Here
each one is appended to `generations.jsonl` at once, in the same format, and a second start asks only what is missing.
The sampling settings are in the requests (`SamplingKeys` in `args.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch, distributions
from thinkswitch_plugin.data.traces import LENGTH
from thinkswitch_plugin.engines.ask import Adapter, Asker, Reply, Request, asking
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.engines.stored import StoredAnswers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.progress import Bar

PROMPT_ROOM = 2048  # tokens left for the prompt beside the completion's budget, if no prompt needs more


class Options(TypedDict, total=False):
    """What `generate` may be told besides.

    Attributes:
        retry_max_tokens: ask an answer that the token limit cut once more with this budget.
        limit: only the first so many requests.
        adapter: put on the checkpoint before it answers (not with a running server).
        without: fields of the requests that are not sent.
        title: of the progress bar.
    """

    retry_max_tokens: int | None
    limit: int | None
    adapter: Adapter | None
    without: Collection[str]
    title: str


@dataclass
class GenerationReport:
    """Counts of one call."""

    requests: int = 0
    already_stored: int = 0
    answered: int = 0
    retried: int = 0
    retries_failed: int = 0
    failed: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0


def pending(
    requests: Path, stored: StoredAnswers, limit: int | None = None, without: Collection[str] = ()
) -> Iterator[Request]:
    """The requests (of the first `limit`) that have no stored answer yet, each with its `place` in the file."""
    for place, (_, row) in enumerate(batch.read_requests(requests, limit)):
        if not stored.has(place, row["custom_id"]):
            body = {name: value for name, value in row["body"].items() if name not in without}
            yield {**row, "body": body, "place": place}


def generate(
    requests: Path,
    out: Path,
    checkpoint: str,
    engine: str | Asker,
    keys: EngineKeys,
    *,
    log: Path,
    **options: Unpack[Options],
) -> GenerationReport:
    """Answer every request that `out` does not hold yet, starting and stopping an engine if need be.

    Args:
        requests: OpenAI batch file.
        out: batch output file, appended to as answers arrive (not in order); or a folder for files of
            `keys.rows_per_file` requests each.
        checkpoint: who answers, whatever `body.model` of a request says; a running server may know it by the name
            `keys.server.model`.
        engine, log: as `asking`.
        options: see `Options`.

    Raises:
        ThinkSwitchError: a request is broken, or the engine does not start, stays away, or does not
            serve the checkpoint. Answers so far are kept, and the same call continues from them.
    """
    limit, retry_max_tokens = options.get("limit"), options.get("retry_max_tokens")
    stored = StoredAnswers(out, keys.rows_per_file)
    report, budget, longest = GenerationReport(), retry_max_tokens or 0, ""
    for place, (number, row) in enumerate(batch.read_requests(requests, limit)):
        if "max_tokens" not in row["body"]:
            raise ThinkSwitchError(
                f"{requests}, line {number}: `body.max_tokens` is missing; delete the file so that it is written again."
            )
        report.requests += 1
        report.already_stored += stored.has(place, row["custom_id"])
        budget = max(budget, row["body"]["max_tokens"])
        longest = max(longest, asked_text(row), key=len)
    if report.already_stored == report.requests:
        return report
    room = None
    if engine == "vllm":
        room = room_for(checkpoint, budget, longest)
    elif engine != "embedded":
        checkpoint = keys.server.model or checkpoint
    with (
        stored.appending(report.requests),
        asking(engine, checkpoint, keys, log=log, max_len=room, adapter=options.get("adapter")) as asker,
        Bar(report.requests, options.get("title", "generate"), initial=report.already_stored, unit="answer") as bar,
    ):
        answers = Arrivals(stored, report, bar, retry_max_tokens)
        asker.ask(pending(requests, stored, limit, options.get("without", ())), answers.store)
        report.tokens_per_second = round(report.tokens / max(bar.elapsed, 1e-9), 1)
    answers.say_retries_failed()
    if report.failed * 2 > report.requests:
        raise ThinkSwitchError(
            f"{report.failed} of {report.requests} requests failed; the last: {answers.last_problem}. "
            "Answers so far are kept; run the same command again to ask the others."
        )
    return report


@dataclass
class Arrivals:
    """Stores each answer as it arrives, and counts it."""

    stored: StoredAnswers
    report: GenerationReport
    bar: Bar
    retry_max_tokens: int | None = None
    last_problem: str = ""
    last_failed_retry: str = ""
    retried: dict[str, dict[str, Any]] = field(default_factory=dict)  # cut answers that are being asked again

    def store(self, request: Request, reply: Reply) -> Request | None:
        """Store a reply; or return the request with the larger budget, if the token limit cut the answer."""
        name = request["custom_id"]
        cut = self.retried.pop(name, None)
        if isinstance(reply, Unanswered):
            if "logprobs" in str(reply) and distributions.requested(request["body"]):
                raise ThinkSwitchError(
                    f"The server refuses to return distributions ({reply}); lower `thinkswitch.distribution.top_k`, "
                    f"{distributions.INSTEAD}."
                )
            if cut is None:
                self.report.failed += 1
                self.last_problem = str(reply)
                self._write(request, None, {"message": str(reply), "type": type(reply).__name__})
                return None
            self.report.retries_failed += 1
            self.last_failed_retry = str(reply)
            reply = cut  # an answer all the same, and counted as cut
        elif cut is None and self.retry_max_tokens and reply["choices"][0].get("finish_reason") == LENGTH:
            self.report.retried += 1
            self.retried[name] = reply
            return {**request, "body": {**request["body"], "max_tokens": self.retry_max_tokens}}
        self.report.answered += 1
        self.report.tokens += batch.tokens_of(reply)
        if distributions.requested(request["body"]):
            reply = _with_distributions(request, reply)
        self._write(request, {"status_code": 200, "request_id": str(reply.get("id")), "body": reply}, None)
        return None

    def say_retries_failed(self) -> None:
        """Print how many retries got no answer, and why; a server's context may be too short for them."""
        if self.report.retries_failed:
            console.say(
                f"  {self.report.retries_failed} of {self.report.retried} retries with {self.retry_max_tokens} tokens "
                f"failed; those answers stay cut. The last: {self.last_failed_retry}"
            )

    def _write(self, request: Request, response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        name = request["custom_id"]
        line = {"id": f"gen-{name}", "custom_id": name, "response": response, "error": error}
        self.stored.append(request["place"], files.dumps_line(line), answered=error is None)
        speed = self.report.tokens / max(self.bar.elapsed, 1e-9)
        failed = f", {self.report.failed} failed" if self.report.failed else ""
        self.bar.note(f"{self.report.tokens:,} tokens, {speed:,.0f} tokens/s{failed}")
        self.bar.update(1)


def asked_text(request: Request) -> str:
    """The text of all turns of a request."""
    return "\n".join(str(turn.get("content")) for turn in request["body"]["messages"])


def room_for(checkpoint: str, budget: int, longest: str = "") -> int:
    """Tokens that a server of a checkpoint needs for a prompt and its completion, at most as many as the checkpoint reads.

    Args:
        budget: of the completion.
        longest: the longest prompt in characters; empty if none needs more than usual.
    """
    return min(budget + prompt_room(longest, checkpoint), context_length(checkpoint))


def _with_distributions(request: Request, reply: dict[str, Any]) -> dict[str, Any]:
    """A reply with the distributions over its answer's tokens alone. Raises `ThinkSwitchError` if the server returned none."""
    try:
        done = batch.asked(request).of(reply)
        return distributions.keep_answer(reply, done.answer if done.complete else None)
    except ValueError as problem:
        raise ThinkSwitchError(
            f"The answer to {request['custom_id']} has no distributions ({problem}); have vLLM answer, or a server that takes "
            f"its field `{distributions.FIELDS[-1]}`, {distributions.INSTEAD}."
        ) from None


def prompt_room(longest: str, checkpoint: str) -> int:
    """Tokens to leave for prompts of which this is the longest in characters, its template included."""
    if len(longest.encode()) + 256 <= PROMPT_ROOM:  # no token is less than a byte
        return PROMPT_ROOM
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(longest, add_special_tokens=False, verbose=False)["input_ids"]
    return max(PROMPT_ROOM, len(ids) * 5 // 4 + 256)  # a shorter text may have more tokens


def context_length(checkpoint: str) -> int:
    """The longest sequence a local checkpoint's config allows; unbounded if it does not say."""
    config = Path(checkpoint) / "config.json"
    found = files.read_json(config).get("max_position_embeddings") if config.is_file() else None
    return int(found or 2**31)
