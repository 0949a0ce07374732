"""What a compiled program moves, read from the text of its optimised HLO module. Pure Python: needs no framework."""
