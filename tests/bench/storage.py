"""Requests and bytes that a run exchanges with a bucket: cold, cached, and cached from an empty folder.

    python -m tests.bench.storage

The bucket is moto's, in this process; every request of the run passes a proxy that counts.
"""

import logging
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli_sandbox import CliSandbox

BUCKET = "bench"


class CountingProxy:
    """Forwards connections to a server and counts requests by method, and bytes either way."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            threading.Thread(target=self.forward, args=(client, server, "up"), daemon=True).start()
            threading.Thread(target=self.forward, args=(server, client, "down"), daemon=True).start()

    def forward(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                self.bytes[way] += len(data)
                if way == "up":
                    method = data.split(b" ", 1)[0]
                    if method in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
                        self.requests[method.decode()] += 1
                sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()

    def reset(self) -> None:
        self.requests.clear()
        self.bytes.clear()


@contextmanager
def counted_bucket() -> Iterator[CountingProxy]:
    """Serve an empty bucket behind a counting proxy."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket=BUCKET)
    proxy = CountingProxy(host, port)
    try:
        yield proxy
    finally:
        proxy.listener.close()
        server.stop()


def main() -> None:
    """Run the quick demo three times and print what each run exchanged."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "testing")
    with tempfile.TemporaryDirectory() as name, counted_bucket() as proxy:
        sandbox = CliSandbox(Path(name))
        words = ["store=s3", f"store.bucket={BUCKET}", f"store.endpoint_url={proxy.url}", "tracking=none"]
        print("| run | requests | sent | received |\n|---|---|---|---|")
        for title, output in (("cold", "runs"), ("cached", "runs"), ("cached, from an empty folder", "others")):
            proxy.reset()
            done = sandbox.run(*words, f"output_dir={output}")
            assert done.returncode == 0, done.stderr
            requests = ", ".join(f"{count} {method}" for method, count in sorted(proxy.requests.items()))
            print(f"| {title} | {requests} | {proxy.bytes['up'] / 1e6:.2f} MB | {proxy.bytes['down'] / 1e6:.2f} MB |")


if __name__ == "__main__":
    main()
