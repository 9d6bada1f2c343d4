"""Prepared sets: MosaicML Streaming's shards, how they are written, and how a rank reads them."""
