"""`python -m compress.cli`, where the script is not on the path."""

from compress.cli import main

main()
