"""`python -m lowbit` is the command `lowbit`."""

from lowbit.cli.main import main

main()
