"""``python -m kdlib.study``."""

from kdlib.study.cli.study import main

main()
