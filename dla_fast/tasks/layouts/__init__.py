"""How published data sets lie on disk, and what their annotations say."""
