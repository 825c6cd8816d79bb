"""Gain and forgetting, measured before and after, and the statistics of their differences."""
