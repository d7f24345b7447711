"""Benchmarks: ratios between set-ups, measured side by side in one run. Absolute times mean little."""
