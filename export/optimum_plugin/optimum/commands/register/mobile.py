"""`optimum-cli export mobile`: the same options and the same pipeline as `python -m export`.

optimum loads every module of this namespace package, so no folder of it may hold an `__init__.py`, and this
module imports nothing heavy.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from export.arguments import add_export_options


class MobileExportCommand(BaseOptimumCLICommand):
    """Qwen3.5 to a validated bundle for a phone runtime."""

    COMMAND = CommandInfo(name="mobile", help="Export Qwen3.5 to a validated bundle for a phone runtime.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Show our options in --help, and keep all other words as they are for our own parser.

        optimum's parser takes abbreviations, and answers mistakes with a page of usage and no JSON.
        """
        add_export_options(parser)
        parse = parser.parse_known_args

        def keep(words: list[str], namespace: Namespace | None = None) -> tuple[Namespace, list[str]]:
            if "-h" in words or "--help" in words:
                return parse(words, namespace)
            options, _ = parse([], namespace)  # the defaults, among them optimum's own
            options.words = words
            return options, []

        parser.parse_known_args = keep

    def run(self) -> None:
        from export.__main__ import main

        sys.exit(main(["export", *self.args.words]))


REGISTER_COMMANDS = [(MobileExportCommand, ExportCommand)]
