"""Runs: recipes, run folders and the named stages that are done once and never twice."""
