"""`optimum-cli export mobile`: the same options and the same pipeline as `python -m export`.

optimum loads every module of this namespace package, so no folder of it may hold an `__init__.py`, and this
module imports nothing heavy.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from export.arguments import add_export_options


class MobileExportCommand(BaseOptimumCLICommand):
    """Qwen3.5 to a validated bundle for a phone runtime."""

    COMMAND = CommandInfo(name="mobile", help="Export Qwen3.5 to a validated bundle for a phone runtime.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_export_options(parser)

    def run(self) -> None:
        from export.__main__ import guarded, run_export

        sys.exit(guarded(lambda: run_export(self.args)))


REGISTER_COMMANDS = [(MobileExportCommand, ExportCommand)]
