"""The subcommands of ``python -m dla_fast``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""
