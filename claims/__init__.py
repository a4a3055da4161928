"""What papers claim, measured again at small scale: `python -m claims` writes one table."""
