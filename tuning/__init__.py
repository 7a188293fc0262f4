"""Recursive self-improvement: a policy in training races against copies of it with other options."""
