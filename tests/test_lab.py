"""`make lab` as whoever runs it, root included: a page for who has the token, on this machine alone."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def status(
    url: str, data: bytes | None = None, method: str | None = None, token: str | None = None
) -> tuple[int, bytes]:
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.notebook
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "jupyter").exists(), reason="the environment that make makes")
def test_make_lab_serves_who_has_the_token_on_this_machine_alone(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["make", "-s", "-o", ".venv/ready", "lab", f"ARGS=--no-browser --port={port} --ServerApp.port_retries=0"]
    environment = os.environ | {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path), "NO_PROXY": "*"}
    output = tmp_path / "output"
    with output.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 180
        while not (found := re.search(rf"http://127\.0\.0\.1:{port}/lab\?token=(\w+)", output.read_text())):
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < until, output.read_text()
            time.sleep(0.3)
        assert (os.getuid() == 0) == ("You are root" in output.read_text())
        address, token = f"http://127.0.0.1:{port}", found[1]
        assert len(token) >= 32
        assert status(f"{address}/api/contents")[0] == 403
        assert status(f"{address}/api/contents", token="0" * len(token))[0] == 403
        code, content = status(f"{address}/api/contents", token=token)
        assert code == 200
        assert "notebooks" in {each["name"] for each in json.loads(content)["content"]}
        code, kernel = status(f"{address}/api/kernels", b"{}", "POST", token)
        assert code == 201
        assert status(f"{address}/api/kernels/{json.loads(kernel)['id']}", method="DELETE", token=token)[0] == 204
        others = {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: says which address this machine has
            others.add(probe.getsockname()[0])
        assert not [host for host in others if not host.startswith("127.") and reachable(host, port)]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
