"""What a comparison is made of: the case, what is measured, what is found, and the verdict."""
