"""Speed and memory, followed by hand: `python -m benchmarks.<name>`. No test runs them."""
