"""A Flower app made of a fedsim strategy and a fedsim recipe."""
