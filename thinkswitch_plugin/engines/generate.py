"""Answer `requests.jsonl` through any OpenAI-compatible server; keep each answer as it arrives.

vLLM's own batch runner writes its output when the whole batch has ended, so a killed
run loses every answer. Here each answer is appended to `generations.jsonl` and flushed
at once, in vLLM's batch output format, and a second start asks only what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.data.traces import LENGTH
from thinkswitch_plugin.engines.servers import Server, lora_arguments, serving
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter"  # as vLLM serves it
PROMPT_ROOM = 2048  # tokens left for the prompt beside the completion's budget, if no prompt needs more


class Adapter(NamedTuple):
    """A PEFT adapter: its folder for vLLM, and what loads the checkpoint with it for an engine in process."""

    folder: Path
    load: Callable[[], PreTrainedModel]


@dataclass
class GenerationReport:
    """Counts of one call."""

    requests: int = 0
    already_stored: int = 0
    answered: int = 0
    retried: int = 0
    failed: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0


def repair(path: Path) -> set[str]:
    """Cut off a torn last line and return the ids of all stored answers.

    Stored failures are forgotten, so that a resumed run asks them again.
    Raises `ThinkSwitchError` for a broken line in the middle.
    """
    done: set[str] = set()
    if not path.exists():
        return done
    keep, drop_failures = 0, False
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                break
            keep += len(line)
            if line.strip():
                row = files.parse_line(line.removeprefix(files.BYTE_ORDER_MARK), path, number)
                if row.get("error"):
                    drop_failures = True
                else:
                    done.add(batch.stored_id(row, path, number))
    if keep < path.stat().st_size:
        with path.open("r+b") as handle:
            handle.truncate(keep)
    if drop_failures:
        with files.atomic_file(path) as out:
            for _, row in files.read_jsonl(path):
                if not row.get("error"):
                    out.write(files.dumps_line(row))
    return done


def pending(requests: Path, done: set[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The requests (of the first `limit`) that have no stored answer yet."""
    return (row for _, row in batch.read_requests(requests, limit) if row["custom_id"] not in done)


def generate(
    requests: Path,
    out: Path,
    checkpoint: str,
    engine: str,
    keys: EngineKeys,
    *,
    retry_max_tokens: int | None = None,
    limit: int | None = None,
    adapter: Adapter | None = None,
    log: Path,
    title: str = "generate",
) -> GenerationReport:
    """Answer every request that `out` does not hold yet, starting and stopping an engine if need be.

    Args:
        requests: OpenAI batch file.
        out: batch output file, appended to as answers arrive (not in order).
        checkpoint: who answers, whatever `body.model` of a request says; a running server may know it by the name
            `keys.server.model`.
        engine: `vllm`, `embedded`, or the base URL of a running server.
        retry_max_tokens: ask an answer that the token limit cut once more with this budget.
        limit: only the first so many requests.
        adapter: put on the checkpoint before it answers (not with a running server).
        log: output of an engine that is started here.

    Raises:
        ThinkSwitchError: a request is broken, or the engine does not start, stays away, or does not
            serve the checkpoint. Answers so far are kept, and the same call goes on from them.
    """
    done = repair(out)
    report, budget, longest = GenerationReport(), 0, ""
    for number, row in batch.read_requests(requests, limit):
        if "max_tokens" not in row["body"]:
            raise ThinkSwitchError(
                f"{requests}, line {number}: `body.max_tokens` is missing; delete the file to have it written anew."
            )
        report.requests += 1
        report.already_stored += row["custom_id"] in done
        budget = max(budget, row["body"]["max_tokens"])
        longest = max(longest, "\n".join(str(m.get("content")) for m in row["body"]["messages"]), key=len)
    if report.already_stored == report.requests:
        return report
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = pending(requests, done, limit)
    with out.open("ab") as handle:
        keep = _Keeper(handle, report)
        if engine == "embedded":
            _answer_embedded(rows, keep, title, checkpoint, adapter, keys.concurrency, retry_max_tokens)
        else:
            from thinkswitch_plugin.engines.client import run_async

            room = None  # a server of the user's own has its own
            if engine == "vllm":
                needed = max(budget, retry_max_tokens or 0) + prompt_room(longest, checkpoint)
                room = min(needed, context_length(checkpoint))
            else:
                checkpoint = keys.server.model or checkpoint
            asked = ADAPTER if adapter else checkpoint
            if adapter:
                options = [*keys.vllm_args, *lora_arguments({ADAPTER: adapter.folder})]
                keys = keys.model_copy(update={"vllm_args": options})
            with serving(engine, checkpoint, keys, log, max_len=room) as server, keep.progress(title):
                run_async(_answer_from_server(rows, keep, server, asked, keys, retry_max_tokens))
    if report.failed * 2 > report.requests:
        raise ThinkSwitchError(
            f"{report.failed} of {report.requests} requests failed; the last: {keep.last_problem}. "
            "Answers so far are kept; run the same command again to ask the others."
        )
    return report


@dataclass
class _Keeper:
    """Appends each answer to the file as it arrives, and counts it."""

    handle: IO[bytes]
    report: GenerationReport
    last_problem: str = ""
    bar: Bar = field(init=False)

    @contextmanager
    def progress(self, title: str) -> Iterator[None]:
        """Show a bar over all requests while the block answers the missing ones."""
        with Bar(self.report.requests, title, initial=self.report.already_stored, unit="answer") as self.bar:
            yield
            self.report.tokens_per_second = round(self.report.tokens / max(self.bar.elapsed, 1e-9), 1)

    def answer(self, row: dict[str, Any], body: dict[str, Any]) -> None:
        """Store a chat completion body."""
        self.report.answered += 1
        self.report.tokens += (body.get("usage") or {}).get("completion_tokens") or 0
        self._write(row, {"status_code": 200, "request_id": str(body.get("id")), "body": body}, None)

    def failure(self, row: dict[str, Any], problem: Exception) -> None:
        """Store that a request has failed for good, and why."""
        self.report.failed += 1
        self.last_problem = str(problem)
        self._write(row, None, {"message": str(problem), "type": type(problem).__name__})

    def _write(self, row: dict[str, Any], response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        line = {"id": f"gen-{row['custom_id']}", "custom_id": row["custom_id"], "response": response, "error": error}
        self.handle.write(files.dumps_line(line))
        self.handle.flush()
        speed = self.report.tokens / max(self.bar.elapsed, 1e-9)
        failed = f", {self.report.failed} failed" if self.report.failed else ""
        self.bar.note(f"{self.report.tokens:,} tokens, {speed:,.0f} tokens/s{failed}")
        self.bar.update(1)


def prompt_room(longest: str, checkpoint: str) -> int:
    """Tokens to leave for prompts of which this is the longest in characters, its template included."""
    if len(longest.encode()) + 256 <= PROMPT_ROOM:  # no token is less than a byte
        return PROMPT_ROOM
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(longest, add_special_tokens=False, verbose=False)["input_ids"]
    return max(PROMPT_ROOM, len(ids) * 5 // 4 + 256)  # a shorter text may have more tokens


def context_length(checkpoint: str) -> int:
    """The longest sequence a local checkpoint's config allows; unbounded where it does not say."""
    config = Path(checkpoint) / "config.json"
    found = files.read_json(config).get("max_position_embeddings") if config.is_file() else None
    return int(found or 2**31)


def was_cut(body: dict[str, Any]) -> bool:
    """Whether a chat completion stopped at its token limit."""
    return bool(body["choices"][0].get("finish_reason") == LENGTH)


def _answer_embedded(
    rows: Iterator[dict[str, Any]],
    keep: _Keeper,
    title: str,
    checkpoint: str,
    adapter: Adapter | None,
    batch: int,
    retry_max_tokens: int | None,
) -> None:
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine

    engine = EmbeddedEngine(checkpoint, adapter.load() if adapter else None)
    with keep.progress(title):
        for row, body in engine.stream(rows, batch):
            if retry_max_tokens and was_cut(body):
                keep.report.retried += 1
                body = engine.answer([{**row["body"], "max_tokens": retry_max_tokens}])[0]
            keep.answer(row, body)


async def _answer_from_server(
    rows: Iterator[dict[str, Any]],
    keep: _Keeper,
    server: Server,
    checkpoint: str,
    keys: EngineKeys,
    retry_max_tokens: int | None,
) -> None:
    from thinkswitch_plugin.engines.client import Client, Unanswered

    client = Client(server, checkpoint, keys)

    async def answer(row: dict[str, Any]) -> None:
        try:
            body = await client.ask(row["body"])
            if retry_max_tokens and was_cut(body):
                keep.report.retried += 1
                with suppress(Unanswered):  # what was cut is an answer all the same, and counted as cut
                    body = await client.ask({**row["body"], "max_tokens": retry_max_tokens})
        except Unanswered as problem:
            keep.failure(row, problem)
        else:
            keep.answer(row, body)

    # A window of tasks rather than one per request, so memory stays flat for any file.
    under_way: set[asyncio.Task[None]] = set()
    try:
        for row in rows:
            if len(under_way) >= keys.concurrency:
                finished, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    task.result()
            under_way.add(asyncio.create_task(answer(row)))
        await asyncio.gather(*under_way)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await client.close()
