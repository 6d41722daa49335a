"""What each command does once its flags are read: one module each. `cli.table` has their flags and imports none."""
