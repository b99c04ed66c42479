"""`python -m insitu` is the `insitu` command, for where its script is not on the path."""

from insitu.cli import main

main()
