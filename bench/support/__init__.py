"""What the benchmarks, the screenshots and the tests share."""
