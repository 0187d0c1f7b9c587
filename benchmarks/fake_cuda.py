"""Import this before torch, built without CUDA, and autograd accepts fake tensors of device "cuda".

Compiles fake_cuda.cpp with g++, which takes some seconds. torch asks for its hooks only once, so they come first.
"""

import ctypes
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

assert "torch" not in sys.modules, "import fake_cuda before torch"
spec = find_spec("torch")
assert spec is not None and spec.origin is not None
folder = Path(spec.origin).parent
flags = [f"-I{folder}/include", f"-I{folder}/include/torch/csrc/api/include", f"-L{folder}/lib", "-lc10", "-ltorch_cpu"]
for name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
with tempfile.TemporaryDirectory() as build:
    library, source = Path(build) / "fake_cuda.so", Path(__file__).with_suffix(".cpp")
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library), *flags]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
