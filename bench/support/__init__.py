"""Code that benchmarks, screenshots and tests share."""
