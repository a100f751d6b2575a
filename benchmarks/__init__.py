"""Benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks decode --help`` one.

Every benchmark prints a table and one JSON line that says what was measured, on which machine,
with which command. Both sides of a ratio are measured in the same process, in turns.
"""
