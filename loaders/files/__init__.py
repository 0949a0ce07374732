"""Files of a checkpoint before a tensor is read: headers, index, what lies beside them, and that they stay the same."""
