"""Reach a server of the user's own: its address, the key, the certificates to trust, the models that it lists."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

from thinkswitch_plugin.engines import replies
from thinkswitch_plugin.environment import Variable, variable
from thinkswitch_plugin.errors import ThinkSwitchError

LOOPBACK = "127.0.0.1"
LISTS_NO_MODELS = (403, 404, 405, 429, 501)  # statuses of /models of servers that may answer all the same


def on_loopback(url: str) -> bool:
    """Whether a server runs on this machine, by its address."""
    return urllib.parse.urlsplit(url).hostname in (LOOPBACK, "localhost", "::1")


def served_models(base_url: str) -> list[str]:
    """The names of the models that a running server answers as. Raises `ThinkSwitchError` if it says none."""
    served = listed_models(base_url)
    if served is None:
        raise ThinkSwitchError(f"The server at {base_url} lists no models (GET {base_url}/models); use one that does.")
    return list(served)


def api_key() -> str | None:
    """The key for a server of the user's own. Raises `ThinkSwitchError`, without the key, if no header can carry it."""
    key = (variable("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ThinkSwitchError("OPENAI_API_KEY holds a character that a key cannot have; copy the key again.")
    return key or None


def without_key(text: str) -> str:
    """A server's words, which may repeat the key that it was sent, as they may stand in a file or a log."""
    key = api_key()
    return text.replace(key, "…") if key and len(key) > 7 else text  # a placeholder such as `none` is no secret


def certificates(base_url: str) -> ssl.SSLContext | None:
    """The certificates that the environment says to trust, None for the machine's own or if there is no TLS.

    Raises `ThinkSwitchError` if they cannot be read.
    """
    names: tuple[Variable, ...] = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR")
    name, value = next(((name, value) for name in names if (value := variable(name))), ("", ""))
    if not value or not base_url.startswith("https://"):
        return None
    path = Path(value)
    try:
        return ssl.create_default_context(
            cafile=None if path.is_dir() else path, capath=path if path.is_dir() else None
        )
    except OSError as error:
        raise ThinkSwitchError(f"{name}={path} is not a file of certificates in PEM format ({error}).") from None


def untrusted(base_url: str, error: BaseException | None) -> ThinkSwitchError | None:
    """What to tell the user if a connection failed because of the server's certificate, None if it did not."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ThinkSwitchError(
                f"The certificate of {base_url} is not trusted ({error.verify_message}); name the file of the "
                "certificates to trust as SSL_CERT_FILE in the environment."
            )
        inner = getattr(error, "reason", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return None


def listed_models(base_url: str) -> dict[str, str] | None:
    """Who owns each model that a running server lists, by name; None if it has no such list.

    Raises `ThinkSwitchError` if no server answers there, it refuses the key, or the address lacks its `/v1`.
    """
    try:
        if (found := _models(base_url)) is not None:
            return found
        status, said = 404, "it lists no models"
    except urllib.error.HTTPError as error:
        status, said = error.code, _words(error)
    except ValueError as error:
        status, said = 200, str(error)
    except (OSError, http.client.HTTPException) as error:
        if fault := untrusted(base_url, error):
            raise fault from None
        status, said = 0, str(error)
    if status in (401, 402):
        raise ThinkSwitchError(
            f"The server at {base_url} refuses the key (status {status}: {said}); set OPENAI_API_KEY."
        )
    if status and not re.search(r"/v\d", urllib.parse.urlsplit(base_url).path):
        with suppress(OSError, ValueError, http.client.HTTPException):
            if _models(f"{base_url}/v1") is not None:
                raise ThinkSwitchError(f"The address of the server lacks its /v1; use ENGINE={base_url}/v1.")
    if status in LISTS_NO_MODELS:
        return None
    raise ThinkSwitchError(
        f"{base_url}: no OpenAI-compatible server answers there ({said}); start it, or leave its address out."
    )


def _models(base_url: str) -> dict[str, str] | None:
    """As `listed_models`. Raises what urllib raises, and `ValueError` if the reply is not JSON."""
    request = urllib.request.Request(f"{base_url}/models")
    if key := api_key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # the key is for this server alone
    with opener(base_url).open(request, timeout=10) as reply:
        found = json.load(reply)
    entries = found.get("data", found.get("models")) if isinstance(found, dict) else found
    if not isinstance(entries, list):
        return None
    names = ((e.get("id") or e.get("name"), e.get("owned_by")) if isinstance(e, dict) else (e, "") for e in entries)
    return {str(name): str(owner) for name, owner in names}


def _words(error: urllib.error.HTTPError) -> str:
    """A server's own words for an error."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        return without_key(replies.words_of(json.loads(text)))
    except ValueError:
        return without_key(replies.words_of(text or error.reason))


def opener(url: str) -> urllib.request.OpenerDirector:
    """What opens a URL of this server, with the environment's proxy and certificates."""
    # A proxy of the environment cannot reach our loopback.
    direct = [urllib.request.ProxyHandler({})] if on_loopback(url) else []
    return urllib.request.build_opener(*direct, urllib.request.HTTPSHandler(context=certificates(url)))
