"""The commands after their flags are read: one module each. `cli.table` has the flags and imports none of these."""
