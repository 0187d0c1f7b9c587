"""What all tests share: how many threads they take, and how hypothesis draws its examples."""

import os

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # one thread per worker, also in the processes that tests start; set before torch reads it
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if WORKER:
    torch.set_num_threads(1)

# No deadline: the first example of a test pays for torch's warm-up, and machines are shared. With CI set, as every CI
# system does, the examples are the same in each run, so that a failure belongs to the change under test.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
