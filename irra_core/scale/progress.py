"""How far long work is → a bar in JupyterLab and Voilà; lines of text in a terminal and in an executed notebook."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as notebook_tqdm

FIRST, EVERY = 2.0, 10.0  # seconds until a line says what is being done, and between the lines after it
GROWTH = 1.25  # between a notebook's lines: a run of 60 hours leaves 50 in its executed notebook, not 20,000


def progress(iterable: Iterable | None = None, **shown: Any) -> Any:
    """A bar with tqdm's arguments and methods, for every `progress=` of this package.

    A bar that moves where somebody looks at it: in JupyterLab, Voilà and at a terminal. In a kernel that papermill or
    nbconvert drives, and where the output is not a terminal, `Lines`.
    """
    if _kernel() is None:
        return (tqdm if sys.stderr.isatty() else Lines)(iterable, **shown)
    return (Lines if _driven() else notebook_tqdm)(iterable, **shown)


def _kernel() -> Any:
    """The Jupyter kernel that this process is, or None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def _driven() -> bool:
    """True in a kernel whose cells are run by a program: an `input()` in them would be answered by nobody.

    Voilà is such a program too, but it shows bars that move.
    """
    asked = _kernel().get_parent("shell").get("content", {})
    return not asked.get("allow_stdin", False) and "VOILA_BASE_URL" not in os.environ


class Lines:
    """A bar in lines of text: what is being done after 2 seconds, then step, losses and time left every 10 seconds.

    A kernel writes them to the stderr that it was started with, which is the terminal of papermill, and to the notebook
    ever more rarely. The last line says how long it took; work with `leave=False` has none, and no lines in the
    notebook.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        desc: str | None = None,
        total: int | float | None = None,
        leave: bool = True,
        initial: int = 0,
        unit: str = "step",
        **_: Any,
    ):
        self.iterable, self.desc, self.leave, self.unit = iterable, desc, leave, unit
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.n = self.initial = initial
        self.postfix, self.began, self.next_in_notebook = "", time.monotonic(), 0.0
        self.closed = threading.Event()
        threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def __iter__(self) -> Iterator:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int | float = 1) -> None:
        """Go on by n; the next line shows it."""
        self.n += n

    def set_postfix(self, values: Mapping[str, Any] | None = None, refresh: bool = True, **more: Any) -> None:
        """Set what the lines show behind the count."""
        self.postfix = ", ".join(f"{name} {value}" for name, value in {**(values or {}), **more}.items())

    def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        """Set what the lines show behind the count."""
        self.postfix = text

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Set what the lines begin with."""
        self.desc = desc

    def refresh(self) -> None:
        """Does nothing: the next line comes by itself."""

    def close(self) -> None:
        """Write the last line, once."""
        if not self.closed.is_set():
            self.closed.set()
            if self.leave:
                self._write(f"{self} in {tqdm.format_interval(self.seconds)}", True)

    @property
    def seconds(self) -> float:
        """Since this work began."""
        return time.monotonic() - self.began

    def __str__(self) -> str:
        of = f" of {self.total:,}" if self.total else ""
        count = f"{self.n:,}{of} {self.unit}{'s' * (self.unit[-1:] != 's')}"
        return ", ".join(filter(None, [f"{self.desc}: {count}" if self.desc else count, self.postfix]))

    def _tick(self) -> None:
        """Write a line now and then until the work is closed."""
        wait = FIRST
        while not self.closed.wait(wait):
            done, left = self.n - self.initial, (self.total or 0) - self.n
            more = f", {tqdm.format_interval(self.seconds / done * left)} left" if done > 0 and left > 0 else ""
            self._write(f"{self}{more}", self.leave and self.seconds >= self.next_in_notebook)
            wait = EVERY

    def _write(self, line: str, in_notebook: bool) -> None:
        """Write a line to the terminal, if there is one, and to the notebook, if this is one."""
        for stream in (sys.stderr, sys.__stderr__):
            with suppress(OSError, ValueError, AttributeError):  # no stderr, or one that is closed: nothing is lost
                terminal = stream.fileno()  # of a kernel's sys.stderr, ipykernel's copy of what the kernel began with
                over = "\r\x1b[K" if os.isatty(terminal) else ""  # papermill's bar, which is then drawn again
                os.write(terminal, f"{over}{line}\n".encode())
                break
        if in_notebook and _kernel() is not None:
            self.next_in_notebook = max(self.seconds * GROWTH, self.seconds + EVERY)
            sys.stdout.write(f"{line}\n")
