"""Other people's models under parity: adapters to ``parity.Backend``, and the life of their weights.

Importing this imports nothing; each module imports the one framework it is about.
"""
