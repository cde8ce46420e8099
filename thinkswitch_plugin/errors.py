"""The one error type whose text is meant for the user."""

from __future__ import annotations


class ThinkSwitchError(Exception):
    """Something the user can act on, said in one sentence: what, where, what to do.

    The command line prints the sentence and exits 1; a traceback only with
    ``THINKSWITCH_DEBUG=1``.
    """
