"""The commands as an installed package has them: gramr2-train, gramr2-selftrain, gramr2-infer, gramr2-data.

In a clone they are the scripts at its top level, and the files here are links to them, as `gramr2/kernels` is
one to `kernels/`: a package that is built holds the files themselves, and the recipes beside them. So
all that is installed stands under `gramr2`, and `torchrun -m gramr2.commands.train` is `torchrun train.py`.
"""

import importlib

from gramr2.interrupts import end_in_one_line


def gramr2_train() -> None:
    _run("gramr2.commands.train")


def gramr2_selftrain() -> None:
    _run("gramr2.commands.selftrain")


def gramr2_infer() -> None:
    _run("gramr2.commands.infer")


def gramr2_data() -> None:
    _run("gramr2.extras.datasets")


def _run(module: str) -> None:
    end_in_one_line()  # Ctrl-C may come while the rest is imported, or a package be missing
    main = importlib.import_module(module).main
    from gramr2.files import run_command

    run_command(main)
