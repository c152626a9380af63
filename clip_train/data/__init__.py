"""Shards -> order -> stream -> decode -> transforms -> batch. Start reading at `order`, then `stream`."""
