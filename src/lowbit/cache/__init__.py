"""Keys and values in few bits: a cache for transformers' `generate`."""
