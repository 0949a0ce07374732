"""What is done on the host around a model, for both backends: inputs, sampling, speculation, processes that agree."""
