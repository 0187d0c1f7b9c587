"""Other implementations' names, arguments and weights for our network: loads their checkpoints, and saves some.

| package | in | out |
|---|---|---|
| perceiver-ar-pytorch (lucidrains) | `load_lucidrains`; its two classes in `compat.lucidrains` | `save_lucidrains` |
| perceiver-io (krasserm) | `load_krasserm` | `save_krasserm` |
| google-research/perceiver-ar | `load_google` | |
"""

from perceiver_ar.compat.google import load_google
from perceiver_ar.compat.krasserm import load_krasserm, save_krasserm
from perceiver_ar.compat.lucidrains import load_lucidrains, save_lucidrains

__all__ = ["load_google", "load_krasserm", "load_lucidrains", "save_krasserm", "save_lucidrains"]
