"""fedsim and its rivals side by side on the same work: ``python -m tests.benchmarks mlp50 mlp400 conv``."""
