"""Around the algorithm: data sets, benchmarks, the toy world, the report. No core module imports it."""
