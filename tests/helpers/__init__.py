"""What tests share: paths, configs, small models and batches, dense oracles, runs as subprocesses."""
