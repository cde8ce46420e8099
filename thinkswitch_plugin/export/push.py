"""`thinkswitch push`: send what a run made to a repository of the Hugging Face hub.

    instruct/, thinking/    the checkpoints of the iteration, each with its card
    adapter/                the LoRA adapter that was trained in it
    pairs.jsonl, pairs.json, report.html, report.json, report.md
    README.md               the card of the repository

huggingface_hub does the work: it creates the repository and commits one folder after the other, the card last.
A file whose hash the hub has already is not sent again, so the same command continues after a kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from thinkswitch_plugin import console, files
from thinkswitch_plugin.environment import variable
from thinkswitch_plugin.errors import ThinkSwitchError, first_line, reason
from thinkswitch_plugin.loop.work import require_finished
from thinkswitch_plugin.report import cards
from thinkswitch_plugin.run import MODES, Run
from thinkswitch_plugin.run.hashes import CARD

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

Content = Path | bytes  # a file as it is, or a text without the paths of this machine

ADAPTER_FILES = ("adapter_*", "config.json", "tokenizer*", "chat_template*")  # not the trainer's card and log
PAIRS, REPORT = ("pairs.jsonl", "pairs.json"), ("report.html", "report.json", "report.md")
TEXTS, LONGEST_TEXT = (".json", ".md", ".yml", ".yaml", ".html"), 10**8
TOKEN_PAGE = "create a token with write access on huggingface.co/settings/tokens"


def push(run: Run, repo: str, *, iteration: int | None, only: str, public: bool, send: bool) -> None:
    """Show what would be sent, and with `send` send it.

    Args:
        repo: `owner/name`; created if it does not exist, private unless `public`.
        iteration: whose checkpoints; None is the last one of the run.
        only: one mode, whose checkpoint alone is sent to the root of the repository; empty sends everything.

    Raises:
        ThinkSwitchError: the iteration is not finished, no token, or the hub refuses.
    """
    k = run.iterations if iteration is None else iteration
    content = checkpoint_files(run, k, only) if only else all_files(run, k)
    api = connected(repo)
    with hub_errors(repo):
        there = stored_files(api, repo, public)
        left = {path: found for path, found in content.items() if not same(found, there.get(path))}
        console.say(overview(repo, content, left, there))
        if not left:
            console.say("  everything is there already; nothing to send")
        elif not send:
            console.say("  nothing has been sent; add --yes (YES=1 with make) to send this")
        else:
            commit(api, repo, left, public, f"{run.recipe.keys.domain}, iteration {k}")


def checkpoint_files(run: Run, k: int, mode: str) -> dict[str, Content]:
    """The files of one checkpoint by their path in the repository. Raises `ThinkSwitchError` if it has no weights."""
    if k == 0:
        raise ThinkSwitchError(
            "Iteration 0 is the starting pair, which this run has not made; use --iteration 1 or more."
        )
    require_finished(run, k)
    return contents(run, k, sorted(path for path in (run.iteration(k) / mode).iterdir() if path.is_file()))


def all_files(run: Run, k: int) -> dict[str, Content]:
    """Everything of an iteration that is published, by its path in the repository.

    Raises `ThinkSwitchError` if the iteration is not finished, or the report is missing.
    """
    found: dict[str, Content] = {}
    for mode in MODES:
        found |= {f"{mode}/{name}": content for name, content in checkpoint_files(run, k, mode).items()}
    here = run.iteration(k)
    adapter = sorted({path for pattern in ADAPTER_FILES for path in (here / "adapter").glob(pattern)})
    found |= {f"adapter/{name}": content for name, content in contents(run, k, adapter).items()}
    rest = [*(here / name for name in PAIRS), *(run.folder / name for name in REPORT)]
    if missing := [path for path in (here / "adapter" / "adapter_config.json", *rest) if not path.is_file()]:
        raise ThinkSwitchError(f"{run.folder} is not finished: {missing[0]} is missing; run `make iterate` first.")
    return found | contents(run, k, rest) | {CARD: card(run, k).encode()}


def contents(run: Run, k: int, paths: list[Path]) -> dict[str, Content]:
    """Files by their name; in texts, paths of this machine are replaced by hub ids, or by paths in the run."""
    names = {str(found["path"]): str(found["name"]) for found in cards.hub_pair(run).values()}
    names |= {f"{folder}/": "" for folder in homes(run, k)}
    found: dict[str, Content] = {}
    for path in paths:
        found[path.name] = path
        if path.suffix in TEXTS and files.size(path) <= LONGEST_TEXT:
            text = changed = path.read_text(encoding="utf-8", errors="surrogateescape")
            for ours, public in names.items():
                changed = changed.replace(ours, public)
            if changed != text:
                found[path.name] = changed.encode(errors="surrogateescape")
    return found


def homes(run: Run, k: int) -> list[Path]:
    """The paths of the run folder that its files may name: now, and when iteration k was trained, if it was moved since."""
    found = [run.folder.resolve(), run.folder]
    config = run.iteration(k) / "axolotl.yaml"
    if config.is_file():
        adapter = Path(str(files.read_yaml(config).get("output_dir")))
        found += [adapter.parents[1]] if adapter.parent.name == config.parent.name else []
    return found


def card(run: Run, k: int) -> str:
    """The card of the repository: what is in it, how to load it, and the report."""
    from huggingface_hub import ModelCardData

    domain, on_hub = run.recipe.keys.domain, cards.hub_pair(run)
    data = ModelCardData(
        base_model=[found["name"] for found in on_hub.values()] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["thinkswitch", domain],
        **cards.licence(run.iteration(k) / mode for mode in MODES),
    )
    rows = {f"`{mode}/`": f"{cards.ABOUT[mode]}." for mode in MODES}
    rows["`adapter/`"] = f"The LoRA adapter of iteration {k}, for the instruct checkpoint of iteration {k - 1}."
    rows["`pairs.jsonl`"] = f"The prompts and answers that iteration {k} was trained on."
    rows["`report.html`"] = "The report: scores, questions and answers; one file that needs no network."
    about = (
        f"Two checkpoints made by [ThinkSwitch](https://arxiv.org/abs/2606.01080) after iteration {k} on the domain "
        f'{domain}. Load one of them with `from_pretrained(…, subfolder="instruct")` or `subfolder="thinking"`.'
    )
    _, _, report = (run.folder / "report.md").read_text(encoding="utf-8").partition("\n")
    return str(
        cards.compose(data, f"{domain}: instruct and thinking", about, rows, f"## Results\n\n{report.strip()}\n")
    )


def connected(repo: str) -> HfApi:
    """The hub as the owner of HF_TOKEN. Raises `ThinkSwitchError` if there is no token, or `repo` cannot be a name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise ThinkSwitchError(
            f"REPO {repo!r} is not the name of a repository ({first_line(error)}); write owner/name."
        ) from None
    token = (variable("HF_TOKEN") or "").strip()
    if not token:
        raise ThinkSwitchError(f"HF_TOKEN is not set; {TOKEN_PAGE} and set HF_TOKEN to it.")
    return HfApi(token=token, library_name="thinkswitch")


def stored_files(api: HfApi, repo: str, public: bool) -> dict[str, RepoFile]:
    """The files that the repository has, by path; none if it does not exist yet.

    Raises `ThinkSwitchError` if it is public, unless that is wanted.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        if not (api.model_info(repo).private or public):
            raise ThinkSwitchError(
                f"{repo} exists and is public; add --public to push to it, or make it private first."
            )
        return {found.path: found for found in api.list_repo_tree(repo, recursive=True) if isinstance(found, RepoFile)}
    except RepositoryNotFoundError:
        return {}


def same(ours: Content, theirs: RepoFile | None) -> bool:
    """Whether the hub has this file. A large one is known by its sha256, another one by its git hash."""
    if theirs is None or theirs.size != size(ours):
        return False
    if theirs.lfs is None:
        data = ours if isinstance(ours, bytes) else ours.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() == theirs.blob_id
    if isinstance(ours, bytes):
        return hashlib.sha256(ours).hexdigest() == theirs.lfs.sha256
    with ours.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() == theirs.lfs.sha256


def size(content: Content) -> int:
    """Bytes of a file."""
    return len(content) if isinstance(content, bytes) else files.size(content)


def readable(contents: Iterable[Content]) -> str:
    """Bytes of files, for a person."""
    total = sum(map(size, contents))
    return f"{total / 1e6:,.1f} MB" if total >= 1e6 else f"{total / 1e3:,.1f} kB"


def overview(
    repo: str, content: Mapping[str, Content], left: Mapping[str, Content], there: Mapping[str, RepoFile]
) -> str:
    """What would be sent, a line each, and what the repository has already."""
    lines = [f"  {path:44} {readable([found]):>12}" for path, found in left.items()]
    head = f"{repo}: {len(left)} files to send, {readable(left.values())}; {len(content) - len(left)} are there already"
    others = len(there.keys() - content.keys())
    return "\n".join([head + (f"; {others} others are there, and stay" if others else ""), *lines])


def commit(api: HfApi, repo: str, left: Mapping[str, Content], public: bool, title: str) -> None:
    """Create the repository and commit the files, those of one folder at a time."""
    from huggingface_hub import CommitOperationAdd

    api.create_repo(repo, private=not public, exist_ok=True)
    # The order is that of `all_files`: whoever sees the card finds all that it names.
    for folder, paths in groupby(left, key=lambda path: path.rpartition("/")[0]):
        chosen = list(paths)
        operations = [
            CommitOperationAdd(path, found if isinstance(found, bytes) else str(found))
            for path, found in ((path, left[path]) for path in chosen)
        ]
        api.create_commit(repo, operations, commit_message=f"{title}: {folder or 'top level'}")
        sent = readable(left[path] for path in chosen)
        console.say(f"  sent {folder or 'top level'}: {len(chosen)} files, {sent}")
    console.say(f"  {api.endpoint}/{repo} ({'public' if public else 'private'})")


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """What the hub refuses, as a sentence."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise ThinkSwitchError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it.") from None
    except HfHubHTTPError as error:
        said = error.server_message or first_line(error)
        status = error.response.status_code
        if status == 401:
            raise ThinkSwitchError(f"The hub does not accept HF_TOKEN ({said}); {TOKEN_PAGE}.") from None
        if status == 403:
            raise ThinkSwitchError(
                f"HF_TOKEN may not write to {repo} ({said}); name a repository of yours, or {TOKEN_PAGE}."
            ) from None
        raise ThinkSwitchError(f"The hub refuses {repo} with status {status} ({said}).") from None
    except (httpx.HTTPError, RuntimeError, ValueError) as error:
        raise ThinkSwitchError(
            f"{repo} could not be sent ({reason(error)}); what has arrived is kept, so run the same command again."
        ) from None
