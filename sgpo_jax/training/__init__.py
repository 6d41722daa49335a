"""The two training loops, the jitted update, and the state, checkpoints and run folder they share."""
