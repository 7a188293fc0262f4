"""Families of tasks made of environments that are not ours: gymnasium's by id, and the user's own."""
