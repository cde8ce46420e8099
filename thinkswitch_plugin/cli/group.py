"""The group that holds the commands: errors as one sentence and an exit code, signals, the environment of engines."""

from __future__ import annotations

import errno
from typing import Any

import click

from thinkswitch_plugin import __version__, console
from thinkswitch_plugin.errors import AGAIN, ThinkSwitchError, with_next_command
from thinkswitch_plugin.run import processes, progress

NO_GPU_MEMORY = (
    "the model and its working memory do not fit on the GPU; stop other programs that use it (see `nvidia-smi`), lower "
    "`thinkswitch.engine.concurrency` or `evaluation.batch_size`, or use vLLM with the recipe's quantization (ENGINE=vllm, or `make serve` and --url), "
    f"and {AGAIN}."
)
PREFIX = "THINKSWITCH"  # of the environment variables that stand for options


def sentence_of(error: Exception) -> str | None:
    """The message of an error for the user; None for a bug, or for an error of click."""
    if isinstance(error, ThinkSwitchError):
        return with_next_command(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("thinkswitch_plugin"):
        return (
            f"{error.name.partition('.')[0]} is not installed here; `pip install 'thinkswitch[loop]'` brings all that the "
            f"commands need (from a checkout: `make setup`). Then {AGAIN}."
        )
    if isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return NO_GPU_MEMORY
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"the disk has no room left{where}: {error.strerror}; no partial output is kept. "
                f"Free some space and {AGAIN}: it continues from here."
            )
        return f"{error.strerror or error}{where}; fix this and {AGAIN}."
    return None


class Group(click.Group):
    """Prints our errors as one sentence and exits 1; its commands take their options from the environment too."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.context_settings = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": PREFIX}
        self.params += [
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
            click.Option(["--owner"], default="", hidden=True),  # process id of the `make` that the user started
        ]

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Give a command's options one prefix, whatever the command."""
        cmd.context_settings.setdefault("auto_envvar_prefix", PREFIX)
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a sub-command."""
        owner, debug = ctx.params.pop("owner"), ctx.params.pop("debug")
        console.quiet_engines()
        console.fetch_no_code()
        processes.end_on_signals()
        processes.end_with_owner(owner)
        try:
            try:
                return super().invoke(ctx)
            finally:
                progress.take_down()
        except processes.Interrupted as signal:
            click.echo("\nthinkswitch: stopped; run the same command again to continue.", err=True)
            ctx.exit(128 + signal.number)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None or debug:
                raise
            click.echo(f"thinkswitch: {sentence}", err=True)
            ctx.exit(1)


@click.group(cls=Group)
@click.version_option(__version__, prog_name="thinkswitch")
def main() -> None:
    """ThinkSwitch: move part of a reasoning model's trace into its weights.

    `make iterate DOMAIN=…` runs these stages in order; each can be run by itself.
    """
