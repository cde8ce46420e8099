"""Ask one checkpoint a list of chat requests: in process, through a vLLM started for it, or through a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.engines.servers import lora_arguments, serving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter"  # the name under which vLLM serves it

Request = dict[str, Any]  # a line of a batch file: `custom_id` and `body`
Reply = dict[str, Any] | Unanswered  # a chat completion body, or why there is none
Arrived = Callable[[Request, Reply], Request | None]  # may return a request to ask in place of the answered one


class Adapter(NamedTuple):
    """A PEFT adapter: its folder for vLLM, and what loads the checkpoint with it for an engine in process."""

    folder: Path
    load: Callable[[], PreTrainedModel]


class Asker(Protocol):
    """A checkpoint that is ready to answer."""

    def ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        """Answer every request and pass each reply to `arrived` as it comes, in any order.

        Raises `ThinkSwitchError` if a server stays away, or refuses what is the same in every request.
        """

    def close(self) -> None:
        """Free the memory that it holds; it answers no more."""


@contextmanager
def asking(
    engine: str | Asker,
    checkpoint: str,
    keys: EngineKeys,
    *,
    log: Path,
    max_len: int | None = None,
    adapter: Adapter | None = None,
) -> Iterator[Asker]:
    """Have a checkpoint ready to answer for the length of the block.

    Args:
        engine: `vllm`, `embedded`, or the base URL of a running server; or a checkpoint that is ready already, and
            stays so.
        checkpoint: folder or hub id; the name under which a server is asked.
        log, max_len: of a vLLM that is started here; see `serving`.
        adapter: put on the checkpoint (not with a running server).

    Raises:
        ThinkSwitchError: as `serving`.
    """
    if not isinstance(engine, str):
        yield engine
        return
    if engine == "embedded":
        from thinkswitch_plugin.engines.embedded import EmbeddedEngine

        loaded = EmbeddedEngine(checkpoint, adapter.load() if adapter else None, keys.concurrency)
        try:
            yield loaded
        finally:
            loaded.close()
        return
    from thinkswitch_plugin.engines.client import ServedModel

    if adapter:
        options = [*keys.vllm_args, *lora_arguments({ADAPTER: adapter.folder})]
        keys = keys.model_copy(update={"vllm_args": options})
    with serving(engine, checkpoint, keys, log, max_len=max_len) as server:
        yield ServedModel(server, ADAPTER if adapter else checkpoint, keys)


def ask_in_order(
    asker: Asker, bodies: Iterable[dict[str, Any]], answered: Callable[[], object] = lambda: None
) -> list[Reply]:
    """The replies to these request bodies, in their order; `answered` is called after each."""
    replies: dict[int, Reply] = {}

    def arrived(request: Request, reply: Reply) -> None:
        replies[int(request["custom_id"])] = reply
        answered()

    asker.ask((batch.request(str(number), body) for number, body in enumerate(bodies)), arrived)
    return [replies[number] for number in sorted(replies)]
