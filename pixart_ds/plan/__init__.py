"""Decisions as functions of numbers: the order of the data, the shares of the ranks, the buckets. No I/O, no torch."""
