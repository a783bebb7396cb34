"""`python -m edmdistill` is the command `edmdistill`."""

from edmdistill.cli import main

main(prog_name="edmdistill")
