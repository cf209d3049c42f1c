"""Images and their classes: found, looked at, divided, turned into tensors."""
