"""How fast `normlab serve` answers over loopback: one client at a time, and many in parallel.

    python -m benchmarks.serve runs/0001-fast79 --out docs/results/serve.json

The server is the real command in a process of its own; clients are threads of another, each with
one connection that stays open. Every request sends one picture of CIFAR-10 as PNG, or a photograph
of 12 megapixels as JPEG that is made here. Client and server share the machine's cores, so the
throughput is a lower bound of the server's.
"""

import argparse
import io
import json
import multiprocessing
import re
import shlex
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.other_load import OtherLoad
from normlab.core.cores import cores
from normlab.core.environment import describe_machine
from normlab.data import load

BOUNDARY = "picture"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def body_of(content: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def small_pictures() -> list[bytes]:
    """Bodies with 32 × 32 pixels as PNG."""
    bodies = []
    for pixels in load("sample").x_test[:64]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        bodies.append(body_of(file.getvalue()))
    return bodies


def photograph() -> list[bytes]:
    """A body with 4000 × 3000 pixels of smooth noise as JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((4000, 3000)).save(file, "JPEG", quality=90)
    return [body_of(file.getvalue())]


def ask(port: int, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Let `clients` threads ask for `seconds`; latencies in milliseconds."""
    latencies: list[list[float]] = [[] for _ in range(clients)]
    refused = [0] * clients
    begin = threading.Barrier(clients + 1)
    end = [0.0]

    def client(i: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.connect()
        begin.wait()
        turn = i
        while (started := time.perf_counter()) < end[0]:
            connection.request("POST", "/predict", bodies[turn % len(bodies)], HEADERS)
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                latencies[i].append(1000 * (time.perf_counter() - started))
            else:
                refused[i] += 1
            turn += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    end[0] = started + seconds
    begin.wait()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    found = np.array([t for one in latencies for t in one])
    p50, p95, p99 = np.percentile(found, (50, 95, 99))
    return {
        "clients": clients,
        "seconds": round(elapsed, 2),
        "answers": len(found),
        "refused": sum(refused),
        "pictures_per_second": round(len(found) / elapsed, 1),
        "latency_ms": {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)},
    }


def measure(port: int, kind: str, clients: int, seconds: float) -> dict[str, Any]:
    """One row, with how many pictures went into a run of the model; in a process of its own."""
    bodies = small_pictures() if kind.startswith("32") else photograph()
    ask(port, bodies, clients, min(1.0, seconds))  # connections, caches, ONNX Runtime's first runs
    before = health(port)
    row = {"pictures": kind, **ask(port, bodies, clients, seconds)}
    after = health(port)
    runs = after["model_runs"] - before["model_runs"]
    row["pictures_per_model_run"] = round((after["pictures"] - before["pictures"]) / runs, 2)
    return row


def health(port: int) -> dict[str, int]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/healthz")
    answer: dict[str, int] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run's folder or an exported .onnx file")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "normlab", "serve", options.model, "--port", "0"]
    others = OtherLoad()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        lines = (re.match(r"Serving at .*:(\d+) ", line) for line in server.stdout)
        found = next(filter(None, lines), None)
        if found is None:  # it has said why
            raise SystemExit(f"{shlex.join(command)} does not serve")
        port = int(found[1])
        rows = []
        for kind, clients in (
            ("32 × 32, PNG", 1),
            ("32 × 32, PNG", 64),
            ("4000 × 3000, JPEG", 1),
            ("4000 × 3000, JPEG", 8),
        ):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (port, kind, clients, options.seconds)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    finally:
        server.terminate()
        server.wait()
    machine = describe_machine(cores(), torch.device("cpu"))
    result = {
        "command": f"python -m benchmarks.serve MODEL --seconds {options.seconds:g}",
        "model": Path(options.model).name,
        "rows": rows,
        "machine": {k: machine[k] for k in ("cpu", "cores", "platform", "python", "normlab")},
        "others_share": others.share(),
        "versions": {n: version(n) for n in ("fastapi", "uvicorn", "onnxruntime", "pillow")},
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
