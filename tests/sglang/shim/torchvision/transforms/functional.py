from on_cpu_absent import absent

__getattr__ = absent(__name__)
