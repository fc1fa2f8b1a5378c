"""Stands in for torchvision, which SGLang imports for models that see.

Package indexes hold its CUDA build, which cannot be loaded beside the CPU build of torch.
"""

from on_cpu_absent import absent

__version__ = "0.0.0"
__getattr__ = absent(__name__)
