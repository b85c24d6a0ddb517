"""Settings: one dataclass per concern, and the command line, YAML and --help made from them."""
