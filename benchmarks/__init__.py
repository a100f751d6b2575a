"""Benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks peft --help`` one.

Those of ``xlora bench`` need only the package; here are the comparisons with other software, the
costs of recording and memory, and the table of targets that all of them are held against.
"""
