"""`thinkswitch push`, against a stand-in for the hub: what is sent, once, also after a kill; and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests import report_run
from tests.conftest import BIN, ROOT, outside_make
from tests.hub_server import READ_ONLY, TOKEN, HubServer
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.push import push
from thinkswitch_plugin.run import MODES, open_run

REPO = "me/arithmetic"
MOVED = "/home/someone/runs/arithmetic"
REPORT = "# arithmetic, seed 0\n\ninstruct gets 88.0 % right.\n"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run whose weights are random bytes."""
    folder = report_run.make_run(tmp_path, questions=2, iterations=1)
    here = folder / "iter-1"
    for mode in MODES:
        for shard in (1, 2):
            (here / mode / f"model-{shard}.safetensors").write_bytes(os.urandom(5000))
        files.write_json(here / mode / "config.json", {"_name_or_path": str(here / mode)})
        (here / mode / "README.md").write_text(f"---\nlicense: mit\n---\n\nmade in `{here / mode}`\n")
    files.write_json(here / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(folder / "iter-0")})
    (here / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(500))
    (here / "adapter" / "README.md").write_text("the trainer's card")
    (here / "adapter" / "debug.log").write_text("a log")
    # Trained where the run was before it was moved.
    (here / "axolotl.yaml").write_text(f"output_dir: {MOVED}/iter-1/adapter\n")
    (here / "pairs.jsonl").write_text('{"messages": []}\n')
    for name, text in {
        "report.html": f"<p>{MOVED}/iter-1/instruct, {folder}/iter-1",
        "report.json": "{}",
        "report.md": REPORT,
    }.items():
        (folder / name).write_text(text)
    return folder


def hub_of(monkeypatch: pytest.MonkeyPatch, server: HubServer, token: str = TOKEN) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)


def pushed(folder: Path, **options: Any) -> None:
    push(open_run(folder), REPO, **{"iteration": None, "only": "", "public": False, "send": True, **options})


def test_a_push_shows_what_it_would_send_and_sends_it_when_told_to(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with HubServer() as hub:
        hub_of(monkeypatch, hub)
        pushed(finished, send=False)
        shown = capsys.readouterr().out
        assert "22 files to send" in shown and "instruct/model-1.safetensors" in shown and "add --yes" in shown
        assert not hub.repos
        pushed(finished)
        tree = hub.repos[REPO]
        assert (
            hub.private[REPO]
            and len(tree) == 22
            and {path.partition("/")[0] for path in tree}
            == {
                *("instruct", "thinking", "adapter", "pairs.jsonl", "pairs.json"),
                *("report.html", "report.json", "report.md", "README.md"),
            }
        )
        assert not {"adapter/README.md", "adapter/debug.log"} & set(tree)  # they hold paths of the machine
        assert hub.commits[-1][-1] == "README.md"
        card = tree["README.md"]["text"]
        assert "license: mit" in card and "instruct gets 88.0 % right" in card and 'subfolder="instruct"' in card
        assert tree["instruct/config.json"]["text"].strip().endswith('"iter-1/instruct"\n}')
        texts = [entry.get("text", "") for entry in tree.values()]
        assert not [text for text in texts if str(finished) in text or MOVED in text]
        assert tree["report.html"]["text"] == "<p>iter-1/instruct, iter-1"

        capsys.readouterr()
        pushed(finished)
        assert "nothing to send" in capsys.readouterr().out and set(hub.received.values()) == {1}
        (finished / "report.md").write_text(REPORT + "\nmore\n")
        pushed(finished)
        assert hub.commits[-1] == ["report.md", "README.md"]


def test_one_checkpoint_alone_lies_at_the_root_where_servers_look(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        hub_of(monkeypatch, hub)
        pushed(finished, only="thinking", public=True)
        assert {"config.json", "model-1.safetensors", "model-2.safetensors", "README.md"} <= set(hub.repos[REPO])
        assert not hub.private[REPO]
        with pytest.raises(ThinkSwitchError, match=f"{REPO} exists and is public; add --public"):
            pushed(finished, only="instruct")


def test_a_killed_push_continues_and_sends_nothing_twice(finished: Path, tmp_path: Path) -> None:
    words = [BIN / "thinkswitch", "push", finished, REPO, "--yes"]
    with HubServer(hold_after=3) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        env = {**outside_make(), **settings}
        first = subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert hub.holding.wait(60)
        first.kill()
        first.wait()
        assert len(hub.objects) == 3 and hub.commits and "README.md" not in hub.repos[REPO]
        hub.release.set()
        done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "are there already" in done.stdout and TOKEN not in done.stdout
        assert len(hub.repos[REPO]) == 22 and set(hub.received.values()) == {1}
        for mode in MODES:
            for path in (finished / "iter-1" / mode).glob("*.safetensors"):
                found = hub.repos[REPO][f"{mode}/{path.name}"]
                assert found["lfs"]["oid"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("", "HF_TOKEN is not set; create a token with write access"),
        ("hf_wrong", r"does not accept HF_TOKEN \(Invalid credentials in Authorization header\)"),
        (READ_ONLY, f"HF_TOKEN may not write to {REPO} .*rights to write here"),
    ],
)
def test_a_token_that_is_missing_wrong_or_may_not_write_is_a_sentence(
    finished: Path, monkeypatch: pytest.MonkeyPatch, token: str, sentence: str
) -> None:
    with HubServer() as hub:
        hub_of(monkeypatch, hub, token)
        with pytest.raises(ThinkSwitchError, match=sentence):
            pushed(finished)
        assert not hub.repos


def test_what_cannot_be_pushed_is_a_sentence(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        hub_of(monkeypatch, hub)
        with pytest.raises(ThinkSwitchError, match=r"is not the name of a repository .*write owner/name"):
            push(open_run(finished), "arithmetic", iteration=None, only="", public=False, send=False)
        with pytest.raises(
            ThinkSwitchError, match=r"Iteration 2 .* has no instruct checkpoint yet; run `make iterate`"
        ):
            pushed(finished, iteration=2)
        (finished / "report.md").unlink()
        with pytest.raises(ThinkSwitchError, match=r"not finished: .*report\.md is missing; run `make iterate`"):
            pushed(finished)
        with pytest.raises(ThinkSwitchError, match="is not a run folder"):
            pushed(finished / "iter-1")
    with pytest.raises(ThinkSwitchError, match=r"could not be sent \(.*Connection refused"):
        pushed(finished, only="instruct")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ThinkSwitchError, match="HF_HUB_OFFLINE is set"):
        pushed(finished, only="instruct")
