"""Around the algorithm: data sets, benchmarks, the toy world, the report. The core imports none of it."""
