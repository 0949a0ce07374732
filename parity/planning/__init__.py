"""What a model will do on a TPU that is not there: does it fit, what does a step move, how fast could it be."""
