import sys
import tempfile
import time

sys.path.insert(0, "tests")
from pathlib import Path
from random import Random

from attack import server

only = sys.argv[1:]
if only:
    server.ATTACKS = {k: v for k, v in server.ATTACKS.items() if v.__name__ in only}
t = time.time()
with tempfile.TemporaryDirectory() as f:
    for c in server.attacks(Path(f), Random(0), 1):
        print(f"{time.time() - t:.1f}", c, flush=True)
        t = time.time()
