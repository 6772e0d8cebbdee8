"""Lets `python -m wakaq` stand for the command `wakaq`."""

from wakaq.cli import main

main(prog_name="wakaq")
