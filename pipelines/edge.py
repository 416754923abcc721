"""The edge of a process: faults become one line and an exit code, progress becomes a bar."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xattn.errors import XattnError
from xattn.structures import Progress

_INTERRUPTED = 130


def run_to_exit(command: Callable[[], object]) -> None:
    """Run a command; a fault that the user can mend ends it with one line and no traceback.

    Exit codes: 0 done, 1 the user can mend it, 3 damage was found, 130 interrupted.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    try:
        command()
    except XattnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer makes this of Ctrl-C, without a word
            print("interrupted", file=sys.stderr)
        raise


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[Progress], None]]:
    """Give a function that draws progress with rate and time left; silent where nobody looks.

    Args:
        label: what is being done.
        unit: what is counted, e.g. "img" or "step".
    """
    from tqdm import tqdm  # noqa: PLC0415 (the command line's --help needs no bar)

    with tqdm(desc=label, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            if bar.total != progress.total:
                bar.total = bar.initial = bar.n = 0
                bar.reset(total=progress.total)
                bar.initial = bar.n = progress.done
            bar.update(progress.done - bar.n)
            if progress.metrics:
                bar.set_postfix({name: f"{value:.4g}" for name, value in progress.metrics.items()})

        yield show
