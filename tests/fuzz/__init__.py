"""Fuzzing that runs for as long as one likes; what of it fits into `make test` is called from there."""
