"""Stands in for torchvision, which SGLang and transformers import for models that see.

Package indexes hold its CUDA build, which cannot be loaded beside the CPU build of torch.
"""

import sys

from on_cpu_absent import Absent

__version__ = "0.0.0"
__getattr__ = Absent(__name__).__getattr__
for module in ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    sys.modules[f"{__name__}.{module}"] = Absent(f"{__name__}.{module}")
