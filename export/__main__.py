"""`python -m export`: arguments and exit codes only.

0 written and every gate passed, 1 the export failed and left nothing, 2 bad usage, 3 a gate failed and the
bundle is kept as `<out>.rejected`, 130 interrupted with `<out>.partial` left for --resume.
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from export import arguments
from export.spec import ExportError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors go to stderr as one line, with --json also to stdout."""
    words = list(sys.argv[1:] if argv is None else argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops a CI job is an interrupt
    return guarded(lambda: _dispatch(words), as_json="--json" in words)


def guarded(command: Callable[[], int], *, as_json: bool = False) -> int:
    """Run a command and turn what stops it into a message and an exit code."""
    try:
        return command()
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    except ExportError as error:
        return _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail("interrupted; repeat the command with --resume to continue an export", INTERRUPTED, as_json)
    except MemoryError:
        return _fail("out of memory; --dry-run estimates what an export needs", 1, as_json)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the disk of {error.filename or 'the output'}; free some", 1, as_json)
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1, as_json)


def _fail(message: str, code: int, as_json: bool) -> int:
    sys.stderr.write(f"error: {message}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
    return code


def _dispatch(words: list[str]) -> int:
    # What a command needs is imported when it runs, so that --help and bad usage need no torch.
    command = arguments.pop_command(words)
    options = arguments.PARSERS[command]().parse_args(words)
    if command == "export":
        return run_export(options)
    arguments.check_bundle_options(options)
    from export import commands

    actions = {"validate": commands.validate, "run": commands.run, "bench": commands.bench, "lint": commands.lint}
    return actions[command](options)


def run_export(options: argparse.Namespace) -> int:
    """The export command, for `python -m export` and `optimum-cli export mobile`."""
    spec = arguments.spec_from(options)
    if options.dry_run:
        from export import plan

        sys.stdout.write(plan.render(plan.make(spec), as_json=options.json))
        return 0
    from export.bundle.writer import check_output

    check_output(spec.output, overwrite=spec.overwrite)
    from export import commands

    return commands.export(spec, options)


if __name__ == "__main__":
    sys.exit(main())
