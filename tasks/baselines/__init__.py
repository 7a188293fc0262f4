"""Baseline policies: what a meta-learned policy is measured against, on the same trials."""
