"""The group that holds the commands: errors as one sentence and an exit code, signals, the environment of engines."""

from __future__ import annotations

import difflib
import errno
import re
from typing import Any

import click

from thinkswitch_plugin import __version__, console, environment
from thinkswitch_plugin.environment import variable
from thinkswitch_plugin.errors import AGAIN, ThinkSwitchError, with_next_command
from thinkswitch_plugin.run import TABLE, processes, progress

NO_GPU_MEMORY = (
    "the model and its working memory do not fit on the GPU; stop other programs that use it (see `nvidia-smi`), lower "
    "`thinkswitch.engine.concurrency` or `evaluation.batch_size`, or use vLLM with the recipe's quantization (ENGINE=vllm, or `make serve` and --url), "
    f"and {AGAIN}."
)
SECTIONS = {
    "Run": ("init", "check", "iterate", "reference", "recipes", "keys"),
    "Look": ("status", "compare", "judge", "eval-model", "score"),
    "Tune λ, the weight of the thinking checkpoint": ("sweep", "eval-merges", "merge", "similarity"),
    "Think only where it pays": ("switch", "answer", "labels"),
    "Serve": ("export-loras", "serve", "serve-lambda"),
    "Publish": ("push", "export-gguf"),
    "Prove": ("verify",),
}
STAGES = "The stages of `iterate`, each by itself on a run folder"
# Make targets whose command has another name, and those whose command takes the run's folder.
RENAMED = {"eval": "eval-model"}
OF_FOLDER = ("status", "verify", "compare", "report", "switch")
POSITIONAL = {"switch": ("ITERATION",), "similarity": ("FIRST", "SECOND")}
NOT_ALIKE = ("pair", "eval")  # stages, which the targets of these names begin a run for
SETTINGS = (
    *("DOMAIN", "RUNS", "SEED", "ENGINE", "ITERATIONS", "ITERATION", "OVERLAY", "KEEP", "MODEL", "OUT", "TASK"),
    *("INSTRUCT", "THINKING", "FIRST", "SECOND", "SAMPLES", "MODE", "FORMATS", "PRICE_PER_HOUR"),
)
# Former names of options.
FORMER = {
    "--template": "--mode",
    "--baselines": "--formats",
    "--price": "--price-per-hour",
    "--pair": "the argument RUN",
    "--answer": "--kind",
}
PREFIX = "THINKSWITCH"  # of the environment variables that stand for options


def sentence_of(error: Exception) -> str | None:
    """The message of an error for the user; None for a bug, or for an error of click."""
    if isinstance(error, ThinkSwitchError):
        return with_next_command(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("thinkswitch_plugin"):
        return (
            f"{error.name.partition('.')[0]} is not installed here; in a clone of the project `make setup`, or "
            f"`pip install '.[loop]'`, brings all that the commands need. Then {AGAIN}."
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


def typed_make() -> bool:
    """Whether the user typed `make …`; `thinkswitch iterate` runs Make too, with INSTALLED=."""
    return variable("MAKELEVEL") is not None and not variable("INSTALLED")


def option(setting: str) -> str:
    """The option that a setting of Make is."""
    return setting.lower().replace("_", "-")


def as_typed(sentence: str) -> str:
    """A sentence with Make's commands and settings as those of `thinkswitch`, as far as it has them."""

    def command(match: re.Match[str]) -> str:
        name, settings = RENAMED.get(match[1], match[1]), dict(re.findall(r"([A-Z_]+)=(\S+)", match[2]))
        if name not in main.commands or name in NOT_ALIKE:
            return match[0]
        folder = ""
        if name in OF_FOLDER:
            folder = f" {settings.pop('RUNS', 'runs')}/{settings.pop('DOMAIN', 'DOMAIN')}"
        folder += "".join(f" {settings.pop(key)}" for key in POSITIONAL.get(name, ()) if key in settings)
        options = (f" --{option(key)} {value}" for key, value in settings.items())
        return f"`thinkswitch {name}{folder}{''.join(options)}`"

    sentence = re.sub(r"`make ([a-z-]+)((?: [A-Z_]+=[^`\s]+)*)`", command, sentence)
    return re.sub(
        rf"(?<![\w`])({'|'.join(SETTINGS)})=(?=([^\s;,)]?))",
        lambda m: f"--{option(m[1])}{' ' if m[2] else ''}",
        sentence,
    )


class Group(click.Group):
    """Prints our errors as one sentence and exits 1; its commands take their options from the environment too."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.context_settings = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": PREFIX}
        self.params += [
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
            click.Option(
                ["--gpus"], type=click.IntRange(min=1), help="Use only the first so many of the visible GPUs."
            ),
            click.Option(["--owner"], default="", hidden=True),  # process id of the `make` that the user started
        ]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; a misspelt one is refused with the nearest name."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"`{ctx.command_path} --help` lists them."
            ctx.fail(f"There is no command {args[0]}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by what one wants to do; those of the loop's stages come last."""
        shown = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        stages = dict.fromkeys(["begin", *(row.command for row in TABLE)])
        listed = {*stages, *(name for names in SECTIONS.values() for name in names)}
        others = [name for name in shown if name not in listed]
        for title, names in {**SECTIONS, "More": others, STAGES: stages}.items():
            there = [(name, self.commands[name]) for name in names if name in self.commands]
            if there:
                with formatter.section(title):
                    formatter.write_dl([(name, found.get_short_help_str(limit=1000)) for name, found in there])

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Give a command's options one prefix, whatever the command."""
        cmd.context_settings.setdefault("auto_envvar_prefix", PREFIX)
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a sub-command."""
        owner, debug, gpus = (ctx.params.pop(name) for name in ("owner", "debug", "gpus"))
        console.quiet_engines()
        console.fetch_no_code()
        processes.end_on_signals()
        processes.end_with_owner(owner)
        try:
            if gpus is not None:
                environment.use_gpus(gpus)
            try:
                return super().invoke(ctx)
            finally:
                progress.take_down()
        except processes.Interrupted as signal:
            click.echo("\nthinkswitch: stopped; run the same command again to continue.", err=True)
            ctx.exit(128 + signal.number)
        except click.NoSuchOption as error:
            known = {name for option in error.ctx.command.params for name in option.opts} if error.ctx else set()
            now = FORMER.get(error.option_name, "")
            if known & {now, now.rpartition(" ")[2].lower()}:
                said = f"No such option {error.option_name}; use {now}."
                raise click.NoSuchOption(error.option_name, said, ctx=error.ctx) from None
            raise
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None or debug:
                raise
            click.echo(f"thinkswitch: {sentence if typed_make() else as_typed(sentence)}", err=True)
            ctx.exit(1)


@click.group(cls=Group)
@click.version_option(__version__, prog_name="thinkswitch")
def main() -> None:
    """ThinkSwitch: move part of a reasoning model's trace into its weights.

    `thinkswitch iterate` runs the whole method; in a clone, `make iterate DOMAIN=…` does the same.
    """
