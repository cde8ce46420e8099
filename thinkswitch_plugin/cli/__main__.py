"""`python -m thinkswitch_plugin.cli`."""

from thinkswitch_plugin.cli import main

main(prog_name="thinkswitch")
