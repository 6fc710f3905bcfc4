"""One run: its loop, its folder, its checkpoints, its metrics."""
