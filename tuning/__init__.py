"""Recursive self-improvement: a population of meta-training runs that mutate, compare and roll back."""
