"""The parts of ``scripts/benchmark.py``, one file each."""
