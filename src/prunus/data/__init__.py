"""Data sets in memory: reading, checking, splitting, batching and augmenting them, with stable example ids."""
