"""One small file an experiment: `get_config()` returns a `configs.base.Config`."""
