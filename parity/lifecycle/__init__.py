"""Every event in the life of a weight, on live models that are observed from outside."""
