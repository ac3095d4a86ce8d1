"""`irra explore` as a process → the page that its address serves."""

import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explored(irra: list, words: list, folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    """What `irra explore WORDS` said up to its address, and the page there. `irra` is the command's own words."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [*irra, "explore", *words, "--no-browser", "--port", port]
    served = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE)
    try:
        said = []
        for line in iter(lambda: served.stderr.readline().decode(), ""):
            said.append(line)
            if found := re.search(r"http://127\S+token=\w+", line):
                break
        else:
            raise AssertionError("".join(said))
        with urllib.request.urlopen(found[0], timeout=300) as page:
            yield said, page.read().decode()
    finally:
        served.terminate()
        served.communicate()
