"""`irra explore`: the search page, served to a browser on this machine."""

import argparse
import subprocess
import sys

from irra_core.command.notebooks import notebook

NOTHING_FROM_ELSEWHERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the page is served."""
    parser.add_argument("--port", type=int, default=8866, help="of the address on this machine (default: 8866)")


def run(arguments: argparse.Namespace) -> int:
    """Serve explorer.ipynb without its code, on this machine only, to who has the token, until Ctrl-C."""
    headers = {"headers": {"Content-Security-Policy": NOTHING_FROM_ELSEWHERE}}
    options = ["--Voila.ip=127.0.0.1", f"--port={arguments.port}", "--token", f"--Voila.tornado_settings={headers!r}"]
    try:
        return subprocess.run([sys.executable, "-m", "voila", str(notebook("explorer")), *options]).returncode
    except KeyboardInterrupt:
        return 130
