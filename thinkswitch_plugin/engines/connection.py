"""Reach a server of the user's own: its address, the key, the certificates to trust, the models that it lists."""

from __future__ import annotations

import json
import re
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

from thinkswitch_plugin.engines import replies
from thinkswitch_plugin.environment import Variable, variable
from thinkswitch_plugin.errors import ThinkSwitchError

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
LISTS_NO_MODELS = (403, 404, 405, 429, 501)  # statuses of /models of servers that may answer all the same


class NoServerError(ThinkSwitchError):
    """No server answers at an address."""


def on_loopback(url: str) -> bool:
    """Whether a server runs on this machine, by its address."""
    return urllib.parse.urlsplit(url).hostname in (LOOPBACK, "localhost", "::1")


def api_key() -> str | None:
    """The key for the user's own server. Raises `ThinkSwitchError`, without the key, if it cannot be sent in a header."""
    key = (variable("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ThinkSwitchError("OPENAI_API_KEY holds a character that a key cannot have; copy the key again.")
    return key or None


def without_key(text: str) -> str:
    """A message from a server, with the key removed, so that it can be written to a file or a log."""
    key = api_key()
    return text.replace(key, "…") if key and len(key) > 7 else text  # a placeholder such as `none` is not a secret


def transport(base_url: str) -> dict[str, Any]:
    """The proxy and certificates for a server, as options of openai's HTTP clients.

    Raises `ThinkSwitchError` if the certificates that the environment names cannot be read.
    """
    verify: ssl.SSLContext | bool = True
    names: tuple[Variable, ...] = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR")
    name, value = next(((name, value) for name in names if (value := variable(name))), ("", ""))
    if value and base_url.startswith("https://"):
        path = Path(value)
        kind = "capath" if path.is_dir() else "cafile"
        try:
            verify = ssl.create_default_context(**{kind: path})  # type: ignore[arg-type]
        except OSError as error:
            raise ThinkSwitchError(f"{name}={path} is not a file of certificates in PEM format ({error}).") from None
    return {"trust_env": not on_loopback(base_url), "verify": verify}  # a proxy cannot reach our loopback


def untrusted(base_url: str, error: BaseException | None) -> ThinkSwitchError | None:
    """What to tell the user if a connection failed because of the server's certificate, None if it did not."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ThinkSwitchError(
                f"The certificate of {base_url} is not trusted ({error.verify_message}); name the file of the "
                "certificates to trust as SSL_CERT_FILE in the environment."
            )
        error = error.__cause__ or error.__context__
    return None


def served_models(base_url: str) -> list[str]:
    """The names of the models that a running server answers as. Raises `ThinkSwitchError` if it lists none."""
    served = listed_models(base_url)
    if served is None:
        raise ThinkSwitchError(f"The server at {base_url} lists no models (GET {base_url}/models); use one that does.")
    return list(served)


def listed_models(base_url: str) -> dict[str, str] | None:
    """Who owns each model that a running server lists, by name; None if it has no such list.

    Raises `ThinkSwitchError` if no server answers there, it refuses the key, or the address lacks its `/v1`.
    """
    import openai

    try:
        if (found := _models(base_url)) is not None:
            return found
        status, words = 404, "it lists no models"
    except openai.APIStatusError as error:
        status, words = error.status_code, without_key(replies.words_of(error.body or error.response.reason_phrase))
    except openai.APIConnectionError as error:
        if fault := untrusted(base_url, error):
            raise fault from None
        status, words = 0, str(error.__cause__ or error)
    except ValueError as error:
        status, words = 200, str(error)
    if status in (401, 402):
        raise ThinkSwitchError(
            f"The server at {base_url} refuses the key (status {status}: {words}); set OPENAI_API_KEY."
        )
    if status and not re.search(r"/v\d", urllib.parse.urlsplit(base_url).path):
        try:
            moved = _models(f"{base_url}/v1") is not None
        except (openai.OpenAIError, ValueError):
            moved = False
        if moved:
            raise ThinkSwitchError(f"The address of the server lacks its /v1; use ENGINE={base_url}/v1.")
    if status in LISTS_NO_MODELS:
        return None
    raise (ThinkSwitchError if status and status < 500 else NoServerError)(
        f"{base_url}: no OpenAI-compatible server answers there ({words}); start it, or leave its address out."
    )


def _models(base_url: str) -> dict[str, str] | None:
    """As `listed_models`. Raises what the openai client raises, and `ValueError` if the reply is not JSON."""
    import openai

    http_client = openai.DefaultHttpxClient(**transport(base_url))
    key = api_key() or "none"
    with openai.OpenAI(
        base_url=base_url, api_key=key, timeout=CONNECT_SECONDS, max_retries=0, http_client=http_client
    ) as client:
        found = json.loads(client.get("/models", cast_to=bytes))
    entries = found.get("data", found.get("models")) if isinstance(found, dict) else found
    if not isinstance(entries, list):
        return None
    names = ((e.get("id") or e.get("name"), e.get("owned_by")) if isinstance(e, dict) else (e, "") for e in entries)
    return {str(name): str(owner) for name, owner in names}
