"""Measuring: accuracy, cost, activity, similarity, and the intervals that go with every mean."""
