"""Stands in for SGLang's package of compiled kernels, which has no build without CUDA.

SGLang imports names from it wherever it might use them, also in modules that a server on a CPU loads.
"""

from on_cpu_absent import Absent

__version__ = "0.0.0"
__getattr__ = Absent(__name__).__getattr__
