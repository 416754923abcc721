"""A real S3 API on loopback for tests: moto's server, and a proxy before it that can go wrong.

A test module names this one in `pytest_plugins`; its tests then take the fixture `s3`. Both servers
run in one process of their own, which ends with its standard input, or after ten minutes. It is
started as: python -m tests.s3_server
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

LIFETIME_S = 600
CONTROL = "/_control"
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>as asked for</Message></Error>"


class S3Server:
    """The servers as tests see them.

    `url` leads through the proxy; `place` is an empty "s3://bucket/folder" of the test's own.
    """

    def __init__(self):
        self.place = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def fail(self, do, *, method="GET", part="", times=1, skip=0, **details):
        """Let the next `times` requests of `method` whose path holds `part` go wrong.

        Args:
            do: "status" (with status, code), "cut" and "hang" (half a body, then the end or nothing
                more), "flip" (a byte of the answer), "flip_sent" (a byte of the request), "etag" (a
                wrong one), "slow" (with delay_s).
            method: of the request.
            part: of its path.
            times: how many such requests.
            skip: how many go through before.
            **details: see `do`.
        """
        fault = {"do": do, "method": method, "part": part, "times": times, "skip": skip, **details}
        self._control("PUT", json.dumps(fault))

    def requests(self, method, part=""):
        """Return (path, Range header) of the requests so far."""
        log = json.loads(self._control("GET"))
        return [(path, span) for verb, path, span in log if verb == method and part in path]

    def reset(self):
        """Forget faults and requests."""
        self._control("DELETE")

    def stop(self):
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _control(self, method, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, CONTROL, body)
            return connection.getresponse().read()
        finally:
            connection.close()


@pytest.fixture(scope="session")
def s3_process():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_process, tmp_path, monkeypatch):
    """Point the AWS chain and the cache to this test's; what is repeated is repeated at once."""
    from xattn import remote

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_process.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-only-0123456789")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("XATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XATTN_CACHE_GB", raising=False)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(remote, "_pause_s", lambda _: 0.0)
    if s3_process.place is None:
        remote._client(os.getpid()).create_bucket(Bucket="testing")
    s3_process.place = f"s3://testing/{uuid.uuid4().hex[:9]}"
    s3_process.reset()
    return s3_process


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port_behind):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port_behind = port_behind
        self.lock = threading.Lock()
        self.faults, self.log = [], []

    def note(self, method, path, span):
        """Log a request; return the fault that it meets."""
        with self.lock:
            self.log.append((method, path, span))
            for fault in self.faults:
                if fault["method"] == method and fault["part"] in path and fault["times"]:
                    if fault["skip"]:
                        fault["skip"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault
        return {"do": None}

    def handle_error(self, request, client_address):
        pass  # clients are killed in tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == CONTROL:
            self.control(body)
            return
        fault = self.server.note(self.command, self.path, self.headers.get("Range"))
        if fault["do"] == "status":
            data = ERROR.format(fault["code"]).encode()
            self.answer(fault["status"], {"Content-Length": len(data)}, data)
            return
        if fault["do"] == "slow":
            time.sleep(fault["delay_s"])
        if fault["do"] == "flip_sent":
            body = flipped(body)
        status, headers, data = self.ask(body)
        if fault["do"] == "flip":
            data = flipped(data)
        if fault["do"] == "etag":
            headers["ETag"] = f'"{"0" * 32}"'
        cut = fault["do"] in ("cut", "hang")
        self.answer(status, headers, data[: len(data) // 2] if cut else data)
        if fault["do"] == "hang":
            time.sleep(30)
        if cut:
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 (http.server's names)

    def ask(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port_behind, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            skipped = {"Connection", "Transfer-Encoding", "Server", "Date"}
            kept = {
                name: value for name, value in answer.getheaders() if name.title() not in skipped
            }
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def control(self, body):
        server, data = self.server, b""
        with server.lock:
            if self.command == "PUT":
                server.faults.append(json.loads(body))
            elif self.command == "DELETE":
                server.faults, server.log = [], []
            else:
                data = json.dumps(server.log).encode()
        self.answer(200, {"Content-Length": len(data)}, data)


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def main():
    from moto.server import ThreadedMotoServer

    # A hung test must not leave a server behind.
    threading.Timer(LIFETIME_S, os._exit, [1]).start()
    behind = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    proxy = Proxy(behind.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(proxy.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
