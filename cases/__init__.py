"""Whole cases: the steps from a volume to its report, many cases, and what they came to."""
