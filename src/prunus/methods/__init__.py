"""Named methods, one per file; `registry.py` lists them."""
