"""The lab of the tests, the demo and the benchmarks: real servers, on loopback, in their own directories."""
