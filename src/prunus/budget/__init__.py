"""How much may stay, and who competes with whom."""
