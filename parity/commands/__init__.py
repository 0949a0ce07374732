"""The verbs of ``tandem``, one module each: ``add_arguments(parser)`` and ``run(args) -> int``; see ``parity.cli``."""
