"""The float64 oracles, one module for each family of ``loaders.families``, and the pieces they are made of."""
