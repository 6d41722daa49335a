"""What a run needs of its machine: processes that act as one, files that survive a kill, progress, signals."""
