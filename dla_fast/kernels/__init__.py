"""Triton kernels: ``<op>.py`` holds an op's kernels, their host functions and the specialisations that ship.

Nothing here is imported with the package: ``dla_fast.ops`` imports a module on the first call that it serves.
"""
