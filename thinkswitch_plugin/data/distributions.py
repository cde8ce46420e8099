"""The thinking checkpoint's distribution over each token of an answer: the `logprobs` of a chat completion, as OpenAI writes them.

Tokens are named by their ids, as vLLM does on request, because several ids may have the same text:

    {"token": "token_id:12", "bytes": [48],
     "top_logprobs": [{"token": "token_id:12", "logprob": -0.1}, {"token": "token_id:17", "logprob": -2.4}]}
"""

from __future__ import annotations

import re
from typing import Any

from thinkswitch_plugin.data.traces import Completion, without_end
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.files import Line

FIELDS = ("logprobs", "top_logprobs", "return_tokens_as_token_ids")  # of a request
# Tokens kept beside those of an answer whose text cannot be found in that of the tokens: its end, spaces, a wrapper.
BESIDE = 32
DIGITS = 6  # of a log probability that is stored
INSTEAD = "or set `thinkswitch.loss: answers`"
_ID = re.compile(r"token_id:(\d+)")

Entry = dict[str, Any]


def request(top_k: int) -> dict[str, Any]:
    """What the body of a request holds to have the `top_k` most likely tokens returned for every token."""
    return dict(zip(FIELDS, (True, top_k, True), strict=True))


def requested(body: dict[str, Any]) -> bool:
    """Whether the body of a request asks for distributions."""
    return bool(body.get("logprobs"))


def entry(token: int, text: str, likely: list[tuple[int, float]]) -> Entry:
    """The entry of one token: its id, its text, and the most likely ids with their log probabilities."""
    top = [{"token": f"token_id:{name}", "logprob": value} for name, value in likely]
    return {"token": f"token_id:{token}", "bytes": list(text.encode(errors="replace")), "top_logprobs": top}


def token_id(named: Entry) -> int:
    """The id that an entry, or one of its `top_logprobs`, names. Raises `ValueError` if it names none."""
    found = _ID.fullmatch(str(named.get("token")))
    if found is None:
        raise ValueError(f"a token is named {str(named.get('token'))[:30]!r}, not by its id (token_id:…)")
    return int(found[1])


def of_completion(body: dict[str, Any]) -> list[Entry]:
    """The entries of a chat completion, one a token. Raises `ValueError`, saying what is wrong, if it has none."""
    found = body["choices"][0].get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    if not isinstance(content, list) or not content:
        raise ValueError("it has no `logprobs`")
    for one in content:
        top = one.get("top_logprobs") if isinstance(one, dict) else None
        if not isinstance(top, list) or not top or not all(isinstance(each, dict) for each in top):
            raise ValueError("its `logprobs` have no `top_logprobs`")
        for each in (one, *top):
            token_id(each)
        if not all(isinstance(each.get("logprob"), int | float) for each in top):
            raise ValueError("a `logprob` is not a number")
    return content


def of_answer(content: list[Entry], answer: str) -> list[Entry]:
    """The entries from the answer's first token on, found by the text of the tokens; each as small as it can be."""
    size = len(answer.encode())
    last, raw, start = content[-(size + BESIDE) :], b"", 0  # a token has at least one byte
    for place in reversed(range(len(last))):
        raw = bytes(last[place].get("bytes") or ()) + raw
        if len(raw) >= size and answer in without_end(raw.decode(errors="replace")):
            start = place
            break
    return [
        {
            "token": one["token"],
            "bytes": one.get("bytes"),
            "top_logprobs": [
                {"token": each["token"], "logprob": round(each["logprob"], DIGITS)} for each in one["top_logprobs"]
            ],
        }
        for one in last[start:]
    ]


def of_pair(request: dict[str, Any], stored: tuple[Line, dict[str, Any]] | None, done: Completion) -> dict[str, Any]:
    """The `logprobs` of a pair, if its request asked for them.

    Args:
        stored: the line and the row of its completion; `done` is the same, split.

    Raises `ThinkSwitchError` if the completion has none.
    """
    if not stored or not requested(request["body"]):
        return {}
    where, row = stored
    try:
        return {"logprobs": of_answer(of_completion(row["response"]["body"]), str(done.answer))}
    except ValueError as problem:
        raise ThinkSwitchError(
            f"{where}: the completion has no distributions ({problem}); generate it again, {INSTEAD}."
        ) from None


def keep_answer(body: dict[str, Any], answer: str | None) -> dict[str, Any]:
    """A chat completion with the entries of its answer alone, and none if it has no answer: traces are long.

    Raises `ValueError` as `of_completion`.
    """
    kept = of_answer(of_completion(body), answer) if answer else []
    first, *others = body["choices"]
    return {**body, "choices": [{**first, "logprobs": {"content": kept}}, *others]}
