"""The one error type whose text is meant for the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

CLOSED = "client has been closed"  # what the hub's client says if its first try found no network
AGAIN = "run the same command again"


class ThinkSwitchError(Exception):
    """An error that the user can act on, as one sentence: what is wrong, where, and what to do.

    The command line prints the sentence and exits 1; a traceback only with
    ``THINKSWITCH_DEBUG=1``.
    """


def with_next_command(sentence: str) -> str:
    """A sentence about an error that ends with the command to run next, unless it names one itself."""
    first = sentence.partition("\n")[0]
    if "`make " in first or AGAIN in first:
        return sentence
    gap = "\n" if "\n" in sentence else " "  # the end of a log is a block of its own
    return f"{sentence}{gap}Fix this, then {AGAIN}."


def not_fetched(what: str, error: BaseException) -> ThinkSwitchError:
    """The sentence for a checkpoint or a dataset that the hub does not give."""
    text = f"{what} cannot be downloaded from the hub: {first_line(error)}"
    if "gated" in f"{type(error).__name__} {error}".lower():
        return ThinkSwitchError(
            f"{text}; accept its terms on its page at huggingface.co, and log in with `hf auth login`."
        )
    return ThinkSwitchError(f"{text}; check its name, the network and your access to it.")


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, and where: `models.0.model`: Field required."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{f'`{where}`: ' if where else ''}{first['msg']}."


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if CLOSED in str(error):
        return "the hub cannot be reached"
    return ((str(error).strip().splitlines() or [""])[0] or type(error).__name__)[:200].rstrip(".")


def reason(error: BaseException) -> str:
    """The first line of the error that started it all."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return first_line(error)
