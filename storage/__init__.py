"""Run folders and checkpoints, on a disk or at a URI."""
