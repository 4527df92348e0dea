"""The command line: its words, checked name by name, what --help says, and sweeps."""
