"""`python -m export`: arguments and exit codes only.

0 written and every gate passed, 1 the export failed and left nothing, 2 bad usage, 3 a gate failed and the
bundle is kept as `<out>.rejected`, 130 interrupted with `<out>.partial` left for --resume.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from export import arguments
from export.spec import ExportError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors go to stderr as one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in arguments.COMMANDS else "export"
    try:
        return _dispatch(command, words)
    except ExportError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; an unfinished export can be continued with --resume\n")
        return INTERRUPTED
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename or ''}\n")
        return 1


def _dispatch(command: str, words: list[str]) -> int:
    # Each command is imported when it runs, so that --help needs no torch.
    if command == "validate":
        options = arguments.validate_parser().parse_args(words)
        from export.commands import validate

        return validate(options)
    if command == "run":
        options = arguments.run_parser().parse_args(words)
        from export.commands import run

        return run(options)
    if command == "bench":
        options = arguments.bench_parser().parse_args(words)
        from export.commands import bench

        return bench(options)
    options = arguments.build_parser().parse_args(words)
    spec = arguments.spec_from(options)
    if options.dry_run:
        from export.plan import dry_run

        return dry_run(spec, as_json=options.json)
    from export.commands import export

    return export(spec, options)


if __name__ == "__main__":
    sys.exit(main())
